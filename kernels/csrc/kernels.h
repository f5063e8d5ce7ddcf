/* What every kernel starts from.
 *
 * Each kernel's file is compiled once per instruction set, with VARIANT as its name; CMakeLists.txt has the list. The
 * same source has to give the same bits in each: no -ffast-math, no contraction of a product and a sum, no reduction
 * whose order could change. Everything but the kernels is static, because the linker keeps one copy of what is not, and
 * that one may be for a processor that this isn't.
 *
 * Python has checked every argument before a pointer comes here: see the package's _arguments.py.
 */
#ifndef QUANTDOCK_KERNELS_H
#define QUANTDOCK_KERNELS_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define QD_CONCAT(variant, name) qd_##variant##_##name
#define QD_NAME(variant, name) QD_CONCAT(variant, name)

/* Defines an exported function: `KERNEL(void, quantize_4bit)(const void *x, ...)`. */
#define KERNEL(type, name) __attribute__((visibility("default"))) type QD_NAME(VARIANT, name)

/* Inlined, so that a constant argument (a dtype) makes a loop of its own for each value. */
#define INLINE static inline __attribute__((always_inline))

/* The numbers are part of the interface: _arguments.py has them too. */
enum dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

#define INFINITE_BITS 0x7F800000u

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* The float32 that the magnitude of a float16 is. Exact; a NaN becomes a quiet one, as in hardware. */
INLINE float magnitude_of_half(uint32_t half) {
    /* Subnormal halves are small integers times 2^-24. That way no subnormal float32 is needed, which some set-ups flush. */
    float subnormal = (float)(int32_t)half * 0x1p-24f;
    uint32_t bits = (half << 13) + (112u << 23);
    bits += half >= 0x7C00 ? 112u << 23 : 0;
    bits |= half > 0x7C00 ? 0x400000u : 0;
    return half < 0x400 ? subnormal : from_bits(bits);
}

INLINE float from_half(uint16_t half) {
    return from_bits(to_bits(magnitude_of_half(half & 0x7FFFu)) | (uint32_t)(half & 0x8000u) << 16);
}

/* Element i as float32; exact. */
INLINE float load(const void *x, int64_t i, enum dtype dtype) {
    if (dtype == FLOAT32)
        return ((const float *)x)[i];
    uint16_t bits = ((const uint16_t *)x)[i];
    return dtype == BFLOAT16 ? from_bits((uint32_t)bits << 16) : from_half(bits);
}

INLINE const void *at(const void *x, int64_t i, enum dtype dtype) {
    return (const char *)x + i * (dtype == FLOAT32 ? 4 : 2);
}

/* The largest magnitude of n elements, in the bits of their own dtype, of which a NaN's are the largest. */
INLINE uint32_t largest_bits(const void *x, int64_t n, enum dtype dtype) {
    if (dtype == FLOAT32) {
        uint32_t largest = 0;
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, (const char *)x + 4 * i, sizeof bits);
            bits &= 0x7FFFFFFF;
            largest = bits > largest ? bits : largest;
        }
        return largest;
    }
    uint16_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint16_t bits = ((const uint16_t *)x)[i] & 0x7FFF;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

INLINE float magnitude(uint32_t bits, enum dtype dtype) {
    if (dtype == FLOAT32)
        return from_bits(bits);
    return dtype == BFLOAT16 ? from_bits(bits << 16) : magnitude_of_half(bits);
}

/* The largest magnitude of n elements; a NaN if there is one, but nobody says which. */
INLINE float largest_magnitude(const void *x, int64_t n, enum dtype dtype) {
    return magnitude(largest_bits(x, n, dtype), dtype);
}

#endif
