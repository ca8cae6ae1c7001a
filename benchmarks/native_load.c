/* Closed-loop load client of the native protocol: C connections with one request each, for S seconds.
 *
 * usage: native_load SOCKET HELLO_FILE FRAME_FILE CONNECTIONS SECONDS
 *
 * HELLO_FILE and FRAME_FILE hold the bytes to send (made by the benchmark in Python, so that this program knows nothing but
 * how long a frame is). Prints one JSON object: requests, seconds, errors, and latency percentiles in microseconds.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { HEADER = 24, RESULT = 17, BUFFER = 1 << 20, MAX_SAMPLES = 1 << 23 };

struct connection {
    int fd;
    uint64_t sent_ns;
    size_t filled;
    unsigned char *buffer;
};

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static unsigned char *slurp(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    if (!f) die(path);
    unsigned char *bytes = malloc(BUFFER);
    *size = fread(bytes, 1, BUFFER, f);
    fclose(f);
    return bytes;
}

static void send_all(int fd, const unsigned char *bytes, size_t size) {
    while (size) {
        ssize_t n = send(fd, bytes, size, MSG_NOSIGNAL);
        if (n < 0) die("send");
        bytes += n;
        size -= (size_t)n;
    }
}

static int by_value(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* Receives once; returns the number of whole frames now in front, of which the last one's type goes to *type. */
static int receive(struct connection *c, int *type) {
    ssize_t n = recv(c->fd, c->buffer + c->filled, BUFFER - c->filled, 0);
    if (n <= 0) die("recv");
    c->filled += (size_t)n;
    int frames = 0;
    for (;;) {
        if (c->filled < HEADER) return frames;
        uint32_t length;
        memcpy(&length, c->buffer, 4);
        if (c->filled < HEADER + (size_t)length) return frames;
        *type = c->buffer[4];
        c->filled -= HEADER + length;
        memmove(c->buffer, c->buffer + HEADER + length, c->filled);
        frames++;
    }
}

int main(int argc, char **argv) {
    if (argc != 6) {
        fprintf(stderr, "usage: native_load SOCKET HELLO_FILE FRAME_FILE CONNECTIONS SECONDS\n");
        return 2;
    }
    size_t hello_size, frame_size;
    unsigned char *hello = slurp(argv[2], &hello_size), *frame = slurp(argv[3], &frame_size);
    int count = atoi(argv[4]);
    double seconds = atof(argv[5]);
    struct connection *all = calloc((size_t)count, sizeof *all);
    uint32_t *samples = malloc(sizeof(uint32_t) * MAX_SAMPLES);
    int poll = epoll_create1(0), type = 0;
    for (int i = 0; i < count; i++) {
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
        all[i].fd = socket(AF_UNIX, SOCK_STREAM, 0);
        all[i].buffer = malloc(BUFFER);
        if (connect(all[i].fd, (struct sockaddr *)&address, sizeof address)) die("connect");
        send_all(all[i].fd, hello, hello_size);
        while (!receive(&all[i], &type)) {
        }
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &all[i]};
        epoll_ctl(poll, EPOLL_CTL_ADD, all[i].fd, &event);
    }
    uint64_t warm_until = now_ns() + 300000000u, begin = 0, end = UINT64_MAX;
    uint64_t requests = 0, errors = 0;
    for (int i = 0; i < count; i++) {
        all[i].sent_ns = now_ns();
        send_all(all[i].fd, frame, frame_size);
    }
    for (uint64_t now = now_ns(); now < end;) {
        struct epoll_event events[256];
        int n = epoll_wait(poll, events, 256, 1000);
        if (n == 0) {
            fprintf(stderr, "no answer for a second\n");
            return 1;
        }
        now = now_ns();
        if (!begin && now > warm_until) {
            begin = now;
            end = begin + (uint64_t)(seconds * 1e9);
        }
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (!receive(c, &type)) continue;
            now = now_ns();
            if (begin) {
                if (requests < MAX_SAMPLES) samples[requests] = (uint32_t)(now - c->sent_ns);
                requests++;
                errors += type != RESULT;
            }
            c->sent_ns = now;
            send_all(c->fd, frame, frame_size);
        }
    }
    uint64_t kept = requests < MAX_SAMPLES ? requests : MAX_SAMPLES;
    qsort(samples, kept, sizeof *samples, by_value);
    double elapsed = (double)(now_ns() - begin) / 1e9;
    printf("{\"requests\": %llu, \"errors\": %llu, \"seconds\": %.4f, \"per_second\": %.1f, \"p50_us\": %.1f, \"p99_us\": %.1f}\n",
           (unsigned long long)requests, (unsigned long long)errors, elapsed, (double)requests / elapsed,
           kept ? samples[kept / 2] / 1e3 : 0, kept ? samples[(uint64_t)((double)kept * 0.99)] / 1e3 : 0);
    return 0;
}
