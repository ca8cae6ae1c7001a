/* Closed-loop load client of the native protocol: C connections with one request each, for S seconds.
 *
 * usage: native_load SOCKET HELLO_FILE FRAME_FILE CONNECTIONS SECONDS
 *
 * HELLO_FILE and FRAME_FILE hold the bytes to send (made by the benchmark in Python, so that this program knows nothing but
 * how long a frame is). Prints one JSON object: requests, seconds, errors, and latency percentiles in microseconds.
 */
#include "native_client.h"

#include <sys/epoll.h>

enum { MAX_SAMPLES = 1 << 23 };

static int by_value(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* Receives once; returns the number of whole frames now in front, of which the last one's type goes to *type. */
static int receive(struct connection *c, int *type) {
    int frames = 0;
    fill(c);
    for (size_t size; (size = whole_frame(c, 0)); frames++) {
        *type = c->buffer[4];
        consume(c, size);
    }
    return frames;
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
        greet(&all[i], argv[1], hello, hello_size);
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
