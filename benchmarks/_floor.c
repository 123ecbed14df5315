/* The floor: what accepting and ending a connection costs with no Python at all.
 *
 *     _floor reject|accept   ->   prints its port, then serves until it is killed
 *
 * One epoll_wait per wake-up, then accept4 as long as somebody waits. Asking
 * poll() for that is cheaper than an accept4 that finds nobody.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BACKLOG = 4096, LIFETIME = 120 /* seconds, then SIGALRM ends it */ };

static void check(int result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(2);
    }
}

static int open_listener(void)
{
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof name;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    check(listener, "socket");
    check(bind(listener, (const void *)&name, size), "bind");
    check(listen(listener, BACKLOG), "listen");
    check(getsockname(listener, (void *)&name, &size), "getsockname");
    printf("%d\n", ntohs(name.sin_port));
    fflush(stdout);
    return listener;
}

static void reject(int connection)
{
    const struct linger reset = {1, 0};
    setsockopt(connection, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    close(connection);
}

static void greet(int connection)
{
    (void)!send(connection, "hello", 5, MSG_NOSIGNAL); /* the generator counts who didn't get it */
    close(connection);
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    void (*job)(int) = strcmp(argv[1], "reject") ? greet : reject;
    alarm(LIFETIME);

    int listener = open_listener();
    int set = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN};
    struct pollfd waiting = {.fd = listener, .events = POLLIN};
    check(set, "epoll_create1");
    check(epoll_ctl(set, EPOLL_CTL_ADD, listener, &event), "epoll_ctl");

    for (;;) {
        if (epoll_wait(set, &event, 1, -1) < 1)
            continue;
        do {
            int connection = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
            if (connection >= 0)
                job(connection);
        } while (poll(&waiting, 1, 0) == 1);
    }
}
