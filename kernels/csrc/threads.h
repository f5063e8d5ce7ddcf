/* Work in the threads that torch has. */
#ifndef QUANTDOCK_THREADS_H
#define QUANTDOCK_THREADS_H

#include "kernels.h"

/* GOMP_parallel of an OpenMP runtime; NULL for one thread. */
typedef void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

#define ENOUGH (1 << 17) /* products for a thread, which take about as long as waking it */

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Up to `count` threads, as many as have something to do. */
INLINE int threads_for(int64_t products, int count) { return (int)least(count, 1 + products / ENOUGH); }

/* Each thread takes pieces until there are none. */
INLINE void run(parallel threads, int count, void (*work)(void *), void *data, int64_t pieces) {
    if (threads && count > 1 && pieces > 1)
        threads(work, data, (unsigned)least(count, pieces), 0);
    else
        work(data);
}

#endif
