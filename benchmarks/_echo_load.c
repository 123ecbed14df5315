/* Load generator: CONNECTIONS to 127.0.0.1:PORT, each with one request of SIZE bytes under way.
 *
 *     _echo_load PORT SIZE CONNECTIONS MILLISECONDS
 *         ->   prints "REQUESTS WRONG NANOSECONDS P50 P90 P99 IDLE"
 *
 * The next request of a connection is sent when the echo of the one before has come whole
 * and is what was sent; no two requests in a row are alike. When the time is over, every
 * connection waits for its last echo, half-closes, and must then read the end of the stream
 * and nothing before it. WRONG counts the connections in which anything was otherwise.
 *
 * Latencies (P50 to P99) are in nanoseconds, from the first byte sent to the last received.
 * IDLE is how many nanoseconds there was nothing to do: near 0, this program and not the
 * server was measured.
 *
 * It never sleeps, for the reason that _load.c gives.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "_load_common.h"

enum {
    MAX_CONNECTIONS = 512,
    MAX_SIZE = 1 << 20,
    SHIFTS = 4096, /* requests are windows of one text of random bytes */
    LIFETIME = 120 /* seconds, then SIGALRM ends it */
};

struct connection {
    int fd;
    int over; /* half-closed: only the end of the stream may come */
    size_t sent, got;
    unsigned shift;
    long long since;
};

static struct connection connections[MAX_CONNECTIONS];
static char text[MAX_SIZE + SHIFTS], echo[MAX_SIZE];
static long long *latencies, first, last, idle;
static size_t size, requests, room;
static long long deadline;
static int open_connections, wrong;

static void note(long long latency)
{
    if (requests == room) {
        room = room ? 2 * room : 65536;
        if (!(latencies = realloc(latencies, room * sizeof *latencies)))
            die("realloc");
    }
    latencies[requests++] = latency;
}

static void end(struct connection *c, int well)
{
    close(c->fd); /* which takes it out of the epoll set, too */
    wrong += !well;
    open_connections--;
}

/* Send what the kernel takes of the request. 0: the connection has failed. */
static int send_on(struct connection *c)
{
    while (c->sent < size) {
        ssize_t n = send(c->fd, text + c->shift + c->sent, size - c->sent, MSG_NOSIGNAL);
        if (n < 0)
            return errno == EAGAIN || errno == EWOULDBLOCK;
        c->sent += (size_t)n;
    }
    return 1;
}

static int begin(struct connection *c)
{
    c->shift = (c->shift + 61) % SHIFTS;
    c->sent = c->got = 0;
    c->since = now();
    return send_on(c);
}

/* Compare what came; after a whole echo, go on with the next request, or half-close. */
static int echoed(struct connection *c, size_t n)
{
    if (c->over || c->got + n > c->sent || memcmp(echo, text + c->shift + c->got, n))
        return 0;
    c->got += n;
    if (c->got < size)
        return 1;
    last = now();
    note(last - c->since);
    if (last < deadline)
        return begin(c);
    c->over = 1;
    return shutdown(c->fd, SHUT_WR) == 0;
}

static void drive(struct connection *c)
{
    if (!c->over && !send_on(c)) {
        end(c, 0);
        return;
    }
    for (;;) {
        /* One byte at least: it would be one too many, and found so. */
        ssize_t n = recv(c->fd, echo, c->over ? 1 : size - c->got, 0);
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return;
        if (n <= 0) {
            end(c, n == 0 && c->over);
            return;
        }
        size_t before = requests;
        if (!echoed(c, (size_t)n)) {
            end(c, 0);
            return;
        }
        if (requests > before && !c->over)
            return; /* the next echo comes with an edge of its own */
    }
}

static void open_connection(struct connection *c, const struct sockaddr_in *server, int set)
{
    const int on = 1;
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c};
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (c->fd < 0 || connect(c->fd, (const void *)server, sizeof *server) < 0)
        die("connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (fcntl(c->fd, F_SETFL, O_NONBLOCK) < 0 || epoll_ctl(set, EPOLL_CTL_ADD, c->fd, &event) < 0)
        die("epoll_ctl");
}

int main(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    struct sockaddr_in server = {
        .sin_family = AF_INET,
        .sin_port = htons((uint16_t)atoi(argv[1])),
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
    size = (size_t)atol(argv[2]);
    open_connections = atoi(argv[3]);
    if (size < 1 || size > MAX_SIZE || open_connections < 1 || open_connections > MAX_CONNECTIONS)
        return 2;
    alarm(LIFETIME);
    for (size_t i = 0; i < sizeof text; i++)
        text[i] = (char)random();
    int set = epoll_create1(EPOLL_CLOEXEC);
    if (set < 0)
        die("epoll_create1");
    const int all = open_connections;
    for (int i = 0; i < all; i++)
        open_connection(&connections[i], &server, set);

    first = last = now();
    deadline = first + atoll(argv[4]) * 1000000;
    for (int i = 0; i < all; i++) {
        connections[i].shift = (unsigned)(i * 127 % SHIFTS);
        if (!begin(&connections[i]))
            end(&connections[i], 0);
    }
    while (open_connections > 0) {
        struct epoll_event events[64];
        const long long before = now();
        int ready = epoll_wait(set, events, 64, 0);
        if (ready < 0)
            die("epoll_wait");
        if (ready == 0) {
            sched_yield(); /* matters only where the server has no core of its own */
            idle += now() - before;
        }
        for (int i = 0; i < ready; i++)
            drive(events[i].data.ptr);
    }
    if (requests)
        qsort(latencies, requests, sizeof *latencies, ascending);
    else
        note(0); /* every connection went wrong; printed as 0 requests */
    const size_t n = last > first ? requests : 0;
    printf("%zu %d %lld %lld %lld %lld %lld\n", n, wrong, last - first, latencies[n / 2],
           latencies[n * 90 / 100], latencies[n * 99 / 100], idle);
    return 0;
}
