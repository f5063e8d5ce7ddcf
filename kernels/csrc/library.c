/* What the library says of itself, and of memory. This file is compiled once, for any processor of the architecture. */

#ifdef __linux__
#include <sys/mman.h>
#endif
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

EXPORT int qd_abi(void);
EXPORT const char *qd_instruction_sets(void);
EXPORT void qd_prefer_large_pages(void *memory, int64_t bytes);

/* Raised when a function is added, removed or called differently; the Python package has to agree with it. */
int qd_abi(void) { return QUANTDOCK_KERNELS_ABI; }

/* The instruction sets that this processor can run, best first: qd_<one of them>_<kernel> may be called. */
const char *qd_instruction_sets(void) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2"))
        return __builtin_cpu_supports("avx512vnni") ? "avx512_vnni avx512 avx2 baseline" : "avx512 avx2 baseline";
    /* Whatever has AVX2 has F16C. */
    if (__builtin_cpu_supports("avx2"))
        return "avx2 baseline";
#endif
    return "baseline";
}

/* Ask for pages of 2 MB where whole ones fit: reading goes further then before an address has to be looked up. */
void qd_prefer_large_pages(void *memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    uintptr_t size = 1 << 21, first = ((uintptr_t)memory + size - 1) & ~(size - 1);
    uintptr_t end = ((uintptr_t)memory + (uintptr_t)bytes) & ~(size - 1);
    if (first < end)
        madvise((void *)first, end - first, MADV_HUGEPAGE); /* a wish: that it isn't granted is no error */
#else
    (void)memory, (void)bytes;
#endif
}
