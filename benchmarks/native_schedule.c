/* Load client of the native protocol that writes down what became of each request.
 *
 * usage: native_schedule SOCKET HELLO_FILE FRAME_FILE RECORDS_FILE CONNECTIONS TIMEOUT_US BEGIN_NS schedule FILE
 *        native_schedule SOCKET HELLO_FILE FRAME_FILE RECORDS_FILE CONNECTIONS TIMEOUT_US BEGIN_NS window REQUESTS SECONDS
 *
 * schedule: an open loop. FILE holds the moments to send at, as u64 nanoseconds after BEGIN_NS in ascending order, however
 * long answers take. window: a closed loop that keeps REQUESTS in flight for SECONDS, all of them sent at once to begin with;
 * after a refusal it waits a millisecond. Requests go over the connections in turn, each with TIMEOUT_US in its header.
 *
 * BEGIN_NS is a moment of CLOCK_MONOTONIC, so that several clients can begin together; 0 for now. RECORDS_FILE gets one
 * `struct record` for each request. Prints one JSON object: requests, and the processor time this program itself took. It
 * sleeps between requests rather than spin, since it shares the cores with what it measures; how late it was is in the
 * records.
 */
#include "native_client.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/timerfd.h>
#include <unistd.h>

enum { INFER_ID = 8, INFER_TIMEOUT = 20, ERROR = 18, TIMINGS = 28, MAX_RECORDS = 1 << 22, EVENTS = 64, BURST = 64 };
enum { PAUSE_NS = 1000000, PATIENCE_MS = 20000 };

struct record {
    uint64_t scheduled_ns; /* when it was to be sent, of CLOCK_MONOTONIC like the next two */
    uint64_t sent_ns;
    uint64_t answered_ns;
    uint32_t queue_us, compute_us, rows; /* as the answer says */
    char kind[20];                       /* of the error; empty for an answer */
};

static struct record *records;
static uint64_t sent, answered, refused_ns;

static void take(const unsigned char *frame, uint64_t now) {
    uint64_t id;
    memcpy(&id, frame + INFER_ID, 8);
    if (id == 0 || id > sent || records[id - 1].answered_ns) {
        fprintf(stderr, "an answer of type %d came for id %llu\n", frame[4], (unsigned long long)id);
        exit(1);
    }
    struct record *r = &records[id - 1];
    r->answered_ns = now;
    answered++;
    const unsigned char *body = frame + HEADER;
    if (frame[4] == RESULT) {
        memcpy(&r->queue_us, body + 8, 4);
        memcpy(&r->compute_us, body + 16, 4);
        memcpy(&r->rows, body + 24, 4);
    } else {
        size_t length = body[1] < sizeof r->kind ? body[1] : sizeof r->kind - 1;
        memcpy(r->kind, body + 2, length);
        refused_ns = now;
    }
}

static void receive(struct connection *c) {
    size_t used = 0;
    fill(c);
    uint64_t now = now_ns();
    for (size_t size; (size = whole_frame(c, used)); used += size) take(c->buffer + used, now);
    consume(c, used);
}

static void wake_at(int timer, uint64_t ns) {
    struct itimerspec when = {.it_value = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)}};
    if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL)) die("timerfd_settime");
}

int main(int argc, char **argv) {
    int is_window = argc == 11 && !strcmp(argv[8], "window");
    if (!is_window && !(argc == 10 && !strcmp(argv[8], "schedule"))) {
        fprintf(stderr, "usage: see native_schedule.c\n");
        return 2;
    }
    size_t hello_size, frame_size;
    unsigned char *hello = slurp(argv[2], &hello_size), *frame = slurp(argv[3], &frame_size);
    int connections = atoi(argv[5]);
    uint32_t timeout_us = (uint32_t)strtoul(argv[6], NULL, 10);
    uint64_t begin = strtoull(argv[7], NULL, 10), total = MAX_RECORDS, window = UINT64_MAX, end = UINT64_MAX;
    uint64_t *schedule = NULL;
    if (is_window) {
        window = strtoull(argv[9], NULL, 10);
    } else {
        FILE *f = fopen(argv[9], "rb");
        if (!f) die(argv[9]);
        schedule = malloc(MAX_RECORDS * sizeof *schedule);
        total = fread(schedule, sizeof *schedule, MAX_RECORDS, f);
        fclose(f);
    }
    records = calloc(MAX_RECORDS, sizeof *records);
    memcpy(frame + INFER_TIMEOUT, &timeout_us, 4);
    struct connection *all = calloc((size_t)connections, sizeof *all);
    int poll = epoll_create1(0), timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(poll, EPOLL_CTL_ADD, timer, &event);
    for (int i = 0; i < connections; i++) {
        greet(&all[i], argv[1], hello, hello_size);
        event.data.ptr = &all[i];
        epoll_ctl(poll, EPOLL_CTL_ADD, all[i].fd, &event);
    }
    if (!begin) begin = now_ns();
    if (is_window) end = begin + (uint64_t)(atof(argv[10]) * 1e9);

    for (int is_sending = 1; is_sending || answered < sent;) {
        int burst = 0;
        /* After a burst answers are read, so that neither side waits for the other. */
        for (; is_sending && burst < BURST && sent - answered < window; burst++) {
            uint64_t now = now_ns(), due = begin;
            if (schedule && sent < total) due = begin + schedule[sent];
            if (is_window && refused_ns) due = refused_ns + PAUSE_NS;
            if (sent == total || now >= end) {
                is_sending = 0;
            } else if (now < due) {
                wake_at(timer, due);
                break;
            } else {
                struct record *r = &records[sent++];
                r->scheduled_ns = is_window ? now : due;
                memcpy(frame + INFER_ID, &sent, 8);
                r->sent_ns = now;
                send_all(all[sent % (uint64_t)connections].fd, frame, frame_size);
            }
        }
        if (!is_sending && answered == sent) break;
        struct epoll_event events[EVENTS];
        int n = epoll_wait(poll, events, EVENTS, burst == BURST ? 0 : PATIENCE_MS);
        if (n == 0 && burst < BURST) {
            fprintf(stderr, "nothing happened for %d s\n", PATIENCE_MS / 1000);
            return 1;
        }
        for (int i = 0; i < n; i++) {
            uint64_t expirations;
            if (events[i].data.ptr) {
                receive(events[i].data.ptr);
            } else if (read(timer, &expirations, sizeof expirations) < 0 && errno != EAGAIN) {
                die("timer");
            }
        }
    }
    FILE *f = fopen(argv[4], "wb");
    if (!f || fwrite(records, sizeof *records, sent, f) != sent || fclose(f)) die(argv[4]);
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    double cpu = (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
                 (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
    printf("{\"requests\": %llu, \"cpu_seconds\": %.4f}\n", (unsigned long long)sent, cpu);
    return 0;
}
