/* The yardstick of benchmarks/io: reads the records whose offsets come on stdin, O_DIRECT, preadv, some threads.

   reader FILE RECORD_BYTES PART_BYTES THREADS LARGE: a record is read with one preadv into buffers of PART_BYTES each,
   as the daemon scatters it into slabs.  LARGE 0: each thread has one buffer, in pages as the system gives them, as
   fio does it.  LARGE 1: every record has its own place in shared memory, which is put together into large pages as the
   daemon does it with its pools (where the system can); that is the most that the device gives.  Prints the seconds that
   reading took. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MOST_OFFSETS 65536
#define MOST_BUFFERS 512
#define MOST_THREADS 64
#define PIECE ((size_t)2 << 20) /* as in daemon/large_pages.py */
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

static long long offsets[MOST_OFFSETS];
static int count, descriptor, large;
static size_t record_bytes, part_bytes;
static atomic_int taken;
static char *memory;

static void *work(void *unused)
{
    struct iovec buffers[MOST_BUFFERS];
    char *own = NULL;
    if (!large && (own = aligned_alloc(4096, (record_bytes + 4095) / 4096 * 4096)) == NULL)
        exit(3);
    for (;;) {
        int number = atomic_fetch_add(&taken, 1), used = 0;
        if (number >= count)
            return unused;
        for (size_t at = 0; at < record_bytes; at += part_bytes, used++) {
            buffers[used].iov_base = (large ? memory + number * record_bytes : own) + at;
            buffers[used].iov_len = record_bytes - at < part_bytes ? record_bytes - at : part_bytes;
        }
        if (preadv(descriptor, buffers, used, offsets[number]) != (ssize_t)record_bytes) {
            fprintf(stderr, "a read failed at byte %lld (%s)\n", offsets[number], strerror(errno));
            exit(4);
        }
    }
}

/* As much shared memory as a pool's: aligned, because nothing else is put together, and its pages present. */
static char *shared_memory(size_t size)
{
    char *reserved = mmap(NULL, size + PIECE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (reserved == MAP_FAILED)
        return reserved;
    char *aligned = (char *)(((size_t)reserved + PIECE - 1) / PIECE * PIECE);
    char *found = mmap(aligned, size, PROT_READ | PROT_WRITE,
                       MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE | MAP_FIXED, -1, 0);
    if (found != MAP_FAILED)
        for (size_t at = 0; at + PIECE <= size; at += PIECE)
            madvise(found + at, PIECE, MADV_COLLAPSE); /* refused: it stays as it is, like a pool */
    return found;
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
    pthread_t threads[MOST_THREADS];
    if (argc != 6)
        return 2;
    record_bytes = strtoull(argv[2], NULL, 10);
    part_bytes = strtoull(argv[3], NULL, 10);
    int most = atoi(argv[4]);
    if (!part_bytes || record_bytes / part_bytes >= MOST_BUFFERS || most < 1 || most > MOST_THREADS)
        return 2;
    while (count < MOST_OFFSETS && scanf("%lld", &offsets[count]) == 1)
        count++;
    descriptor = open(argv[1], O_RDONLY | O_DIRECT);
    if (descriptor < 0) {
        fprintf(stderr, "%s cannot be opened for direct reads (%s)\n", argv[1], strerror(errno));
        return 4;
    }
    large = atoi(argv[5]);
    if (large && (memory = shared_memory(count * record_bytes)) == MAP_FAILED) {
        fprintf(stderr, "there is no memory for %d records (%s)\n", count, strerror(errno));
        return 3;
    }
    double began = now();
    for (int n = 0; n < most; n++)
        pthread_create(&threads[n], NULL, work, NULL);
    for (int n = 0; n < most; n++)
        pthread_join(threads[n], NULL);
    printf("%.6f\n", now() - began);
    return 0;
}
