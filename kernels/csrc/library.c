/* What the library says of itself. This file is compiled once, for any processor of the architecture. */

#define EXPORT __attribute__((visibility("default")))

EXPORT int qd_abi(void);
EXPORT const char *qd_instruction_sets(void);

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
