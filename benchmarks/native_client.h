/* What our load clients of the native protocol share: a clock, files, and connections that take frames apart. */
#ifndef NATIVE_CLIENT_H
#define NATIVE_CLIENT_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>

/* Bytes of a frame's header; types of frames (docs/protocol.md). */
enum { HEADER = 24, RESULT = 17, BUFFER = 1 << 20 };

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

/* Receives once; returns how many bytes are in the buffer. */
static size_t fill(struct connection *c) {
    ssize_t n = recv(c->fd, c->buffer + c->filled, BUFFER - c->filled, 0);
    if (n <= 0) die("recv");
    return c->filled += (size_t)n;
}

/* The frame's whole size where all of it lies at `at`, else 0. */
static size_t whole_frame(const struct connection *c, size_t at) {
    uint32_t length;
    if (c->filled - at < HEADER) return 0;
    memcpy(&length, c->buffer + at, 4);
    return c->filled - at < HEADER + (size_t)length ? 0 : HEADER + (size_t)length;
}

/* Forgets the first `used` bytes. */
static void consume(struct connection *c, size_t used) {
    c->filled -= used;
    memmove(c->buffer, c->buffer + used, c->filled);
}

/* Connects, sends HELLO and waits for the answer. */
static void greet(struct connection *c, const char *path, const unsigned char *hello, size_t hello_size) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    c->fd = socket(AF_UNIX, SOCK_STREAM, 0);
    c->buffer = malloc(BUFFER);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address)) die("connect");
    send_all(c->fd, hello, hello_size);
    size_t size = 0;
    while (!size) {
        fill(c);
        size = whole_frame(c, 0);
    }
    consume(c, size);
}

#endif
