/* Load generator: a flood of callers to be rejected, and echoes on one established stream.
 *
 *     _flood PORT RATE MILLISECONDS
 *         ->   prints "STARTED RESET WRONG MOST_OPEN NANOSECONDS WAITED ECHOES BAD P50 P99 WORST"
 *
 * From 127.0.0.1, RATE connections a second are begun, evenly, and each must end in a reset
 * without one byte; WRONG counts those that did not, LIMIT after the last was begun. No more
 * than MAX_OPEN are open at once: a server that cannot keep up gets fewer than RATE, and
 * MOST_OPEN says how many it left waiting. NANOSECONDS is the time up to the last reset, WAITED
 * how long of it this program could have run and did not get its core.
 *
 * From 127.0.0.2, one connection sends SIZE bytes every INTERVAL, or when the echo before has
 * come, if that is later. BAD is 1 if an echo was not what was sent, or missing, or the stream
 * had another end than its own. Latencies are in nanoseconds, from the first byte sent.
 *
 * One program, for two that share a core would measure each other. It sleeps until something is
 * due, since whoever never does is sent to wait for milliseconds on a machine that has other work.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "_load_common.h"

enum {
    MAX_OPEN = 4000, /* the servers' backlog is 4096 */
    MAX_FD = 1 << 16,
    SIZE = 64,
    INTERVAL = 500000,            /* nanoseconds */
    MAX_ECHOES = 120 * 2000,      /* LIFETIME / INTERVAL */
    LIFETIME = 120                /* seconds, then SIGALRM ends it */
};
static const long long LIMIT = 3000000000LL;

static struct sockaddr_in server;
static int set, echo_fd;
static long started, reset, wrong, open_now, most_open;
static char is_open[MAX_FD];

static long long latencies[MAX_ECHOES];
static int echoes, bad, under_way;
static char request[SIZE], echo[SIZE];
static size_t got;
static long long since;

static void ended(int fd, int well)
{
    close(fd); /* which takes it out of the epoll set, too */
    is_open[fd] = 0;
    open_now--;
    reset += well;
    wrong += !well;
}

static void begin_caller(void)
{
    /* With a reset at the end no TIME_WAIT is left, see _load.c. */
    const struct linger linger = {1, 0};
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (fd < 0 || fd >= MAX_FD)
        die("socket");
    struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP, .data.fd = fd};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    started++;
    is_open[fd] = 1;
    if (++open_now > most_open)
        most_open = open_now;
    if (connect(fd, (const void *)&server, sizeof server) < 0 && errno != EINPROGRESS)
        ended(fd, errno == ECONNRESET); /* a fast server is done already */
    else if (epoll_ctl(set, EPOLL_CTL_ADD, fd, &event) < 0)
        die("epoll_ctl");
}

static void read_caller(int fd)
{
    char byte;
    if (recv(fd, &byte, 1, 0) < 0) {
        if (errno != EAGAIN && errno != EINTR)
            ended(fd, errno == ECONNRESET);
    } else {
        ended(fd, 0);
    }
}

static void begin_echo(void)
{
    request[echoes % SIZE]++;
    got = 0;
    under_way = 1;
    since = now();
    bad |= send(echo_fd, request, SIZE, MSG_NOSIGNAL) != SIZE;
}

static void read_echo(void)
{
    const ssize_t n = recv(echo_fd, echo + got, SIZE - got, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0 || !under_way) {
        bad = 1;
        return;
    }
    got += (size_t)n;
    if (got == SIZE) {
        bad |= memcmp(request, echo, SIZE) != 0;
        latencies[echoes++] = now() - since;
        under_way = 0;
    }
}

static void open_echo(void)
{
    const int on = 1;
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK + 1)};
    const struct timeval patience = {LIMIT / 1000000000LL, 0};
    echo_fd = socket(AF_INET, SOCK_STREAM, 0);
    if (echo_fd < 0 || bind(echo_fd, (const void *)&own, sizeof own) < 0 ||
        connect(echo_fd, (const void *)&server, sizeof server) < 0)
        die("connect");
    setsockopt(echo_fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(echo_fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = echo_fd};
    if (epoll_ctl(set, EPOLL_CTL_ADD, echo_fd, &event) < 0)
        die("epoll_ctl");
}

/* Handle what has come; if nothing has, wait up to then, which epoll_wait(2) could not. */
static void look(long long then)
{
    struct epoll_event events[64];
    struct pollfd poll = {.fd = set, .events = POLLIN};
    const long long ahead = then - now();
    const struct timespec timeout = {ahead / 1000000000, ahead % 1000000000};
    if (ahead > 0 && ppoll(&poll, 1, &timeout, NULL) < 0)
        die("ppoll");
    int ready = epoll_wait(set, events, 64, 0);
    if (ready < 0)
        die("epoll_wait");
    for (int i = 0; i < ready && !bad; i++) {
        if (events[i].data.fd == echo_fd)
            read_echo();
        else
            read_caller(events[i].data.fd);
    }
}

/* Nanoseconds; the second field of proc_pid_schedstat(5). */
static long long waited(void)
{
    long long ran, waited = 0;
    FILE *file = fopen("/proc/self/schedstat", "r");
    if (file) {
        if (fscanf(file, "%lld %lld", &ran, &waited) != 2)
            waited = 0;
        fclose(file);
    }
    return waited;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    server = (struct sockaddr_in){
        .sin_family = AF_INET,
        .sin_port = htons((uint16_t)atoi(argv[1])),
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
    const double gap = 1e9 / atof(argv[2]);
    alarm(LIFETIME);
    if (prctl(PR_SET_TIMERSLACK, 1L) < 0) /* in nanoseconds, instead of 50,000 */
        die("prctl");
    set = epoll_create1(EPOLL_CLOEXEC);
    if (set < 0)
        die("epoll_create1");
    open_echo();

    const long long waited_before = waited();
    const long long first = now(), deadline = first + atoll(argv[3]) * 1000000;
    const long all = (long)((double)(deadline - first) / gap);
    long long next_echo = first, last = first;
    for (long long at = first; !bad && at < deadline + LIMIT; at = now()) {
        /* One at a time: what has come in between is not kept waiting. */
        const long long due = first + (long long)((double)started * gap);
        if (started < all && at >= due && open_now < MAX_OPEN && at < deadline)
            begin_caller();
        if (!under_way && at >= next_echo && at < deadline && echoes < MAX_ECHOES) {
            begin_echo();
            next_echo = (next_echo + INTERVAL > at ? next_echo : at) + INTERVAL;
        }
        const long before = reset;
        const long long next_caller = first + (long long)((double)started * gap);
        long long next = at + 1000000;
        if (started < all && next_caller < next && open_now < MAX_OPEN)
            next = next_caller;
        if (!under_way && next_echo < next)
            next = next_echo;
        look(next);
        if (reset > before)
            last = now();
        if (at >= deadline && !open_now && !under_way)
            break;
    }
    bad |= under_way || shutdown(echo_fd, SHUT_WR) < 0 || recv(echo_fd, echo, 1, 0) != 0;
    wrong += open_now;
    qsort(latencies, (size_t)echoes, sizeof *latencies, ascending);
    printf("%ld %ld %ld %ld %lld %lld %d %d %lld %lld %lld\n", started, reset, wrong, most_open,
           last - first, waited() - waited_before, echoes, bad, latencies[echoes / 2], latencies[echoes * 99L / 100],
           latencies[echoes ? echoes - 1 : 0]);
    return 0;
}
