/* Load generator: COUNT connections to 127.0.0.1:PORT, BURST of them at a time.
 *
 *     _load PORT COUNT BURST REQUEST   ->   prints "SERVED RESET EMPTY WRONG NANOSECONDS"
 *
 * Each sends REQUEST bytes, maybe none, as soon as it is connected.
 * A burst is started whole and must have ended whole before the next begins.
 * SERVED got exactly "hello" and then EOF, RESET got a reset and not one byte,
 * EMPTY an EOF and not one byte, and WRONG is everything else. NANOSECONDS is
 * what all of it took by the wall.
 *
 * It never sleeps: a server on the same machine would pay for waking it, and no
 * server pays for waking a client at the other end of a network.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "_load_common.h"

enum { MAX_BURST = 512, MAX_REQUEST = 1024, LIFETIME = 120 /* seconds, then SIGALRM ends it */ };
enum outcome { SERVED, RESET, EMPTY, WRONG, OPEN };

static const char greeting[] = "hello";
static struct pollfd clients[MAX_BURST];
static char got[MAX_BURST][sizeof greeting]; /* one byte more than is right */
static size_t got_len[MAX_BURST];
static const char request[MAX_REQUEST];
static size_t request_len;
static long counts[OPEN];

static enum outcome read_on(int i)
{
    for (;;) {
        ssize_t n = recv(clients[i].fd, got[i] + got_len[i], sizeof got[i] - got_len[i], 0);
        if (n > 0) {
            got_len[i] += (size_t)n;
            if (got_len[i] == sizeof got[i])
                return WRONG;
        } else if (n == 0) {
            size_t want = sizeof greeting - 1;
            if (got_len[i] == 0)
                return EMPTY;
            return got_len[i] == want && !memcmp(got[i], greeting, want) ? SERVED : WRONG;
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            return OPEN;
        } else if (errno != EINTR) {
            return errno == ECONNRESET && got_len[i] == 0 ? RESET : WRONG;
        }
    }
}

/* POLLOUT among the events says that the request has not been sent. */
static enum outcome send_request(int i)
{
    if (send(clients[i].fd, request, request_len, MSG_NOSIGNAL) == (ssize_t)request_len)
        clients[i].events = POLLIN;
    else if (errno != EAGAIN && errno != EWOULDBLOCK) /* not connected yet */
        return errno == ECONNRESET ? RESET : WRONG;
    return OPEN;
}

static void open_client(int i)
{
    /* Ended with a reset, a connection leaves no TIME_WAIT on either side:
     * the last round finds the kernel's tables as empty as the first did. */
    const struct linger reset = {1, 0};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || fcntl(fd, F_SETFL, O_NONBLOCK) < 0)
        die("socket");
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    clients[i] = (struct pollfd){.fd = fd, .events = request_len ? POLLIN | POLLOUT : POLLIN};
    got_len[i] = 0;
}

static void end_client(int i, enum outcome outcome)
{
    counts[outcome]++;
    close(clients[i].fd);
    clients[i].fd = -1; /* poll() skips it */
}

static void run_burst(const struct sockaddr_in *server, int size)
{
    int open = size;
    for (int i = 0; i < size; i++)
        open_client(i);
    for (int i = 0; i < size; i++) {
        enum outcome outcome = OPEN;
        if (connect(clients[i].fd, (const void *)server, sizeof *server) < 0 && errno != EINPROGRESS)
            outcome = errno == ECONNRESET ? RESET : WRONG; /* a fast server is done already */
        else if (request_len)
            outcome = send_request(i);
        if (outcome != OPEN) {
            end_client(i, outcome);
            open--;
        }
    }
    while (open > 0) {
        int ready = poll(clients, (nfds_t)size, 0);
        if (ready < 0)
            die("poll");
        if (ready == 0)
            sched_yield(); /* matters only where the server has no core of its own */
        for (int i = 0; i < size; i++) {
            enum outcome outcome = OPEN;
            if (clients[i].fd >= 0 && clients[i].revents) {
                if (clients[i].events & POLLOUT)
                    outcome = send_request(i);
                if (outcome == OPEN)
                    outcome = read_on(i);
            }
            if (outcome != OPEN) {
                end_client(i, outcome);
                open--;
            }
        }
    }
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
    long count = atol(argv[2]);
    int burst = atoi(argv[3]);
    request_len = strtoul(argv[4], NULL, 10);
    if (burst < 1 || burst > MAX_BURST || request_len > MAX_REQUEST)
        return 2;
    alarm(LIFETIME);
    long long before = now();
    while (count > 0) {
        int size = count < burst ? (int)count : burst;
        run_burst(&server, size);
        count -= size;
    }
    printf("%ld %ld %ld %ld ", counts[SERVED], counts[RESET], counts[EMPTY], counts[WRONG]);
    printf("%lld\n", now() - before);
    return 0;
}
