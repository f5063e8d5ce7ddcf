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
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __F16C__
#include <immintrin.h>
#endif

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

/* The float16 that is nearest to a value, as a float32; a NaN stays one. */
INLINE float to_nearest_half(float value) {
    uint32_t bits = to_bits(value) & 0x7FFFFFFF;
    /* A power of two so large that the sum has as many bits below it as float16 has; 2^-14 is its smallest normal. */
    uint32_t exponent = bits & INFINITE_BITS;
    exponent = exponent < 113u << 23 ? 113u << 23 : exponent;
    exponent = exponent > 200u << 23 ? 200u << 23 : exponent;
    float power = from_bits(exponent + (13u << 23));
    uint32_t rounded = to_bits((from_bits(bits) + power) - power);
    rounded = rounded >= 143u << 23 ? INFINITE_BITS : rounded; /* 65536 and above */
    rounded = bits > INFINITE_BITS ? bits : rounded;
    return from_bits(rounded | (to_bits(value) & 0x80000000u));
}

/* The bits of the bfloat16 that is nearest to a value, ties to even; a NaN stays one. */
INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits = to_bits(value);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > INFINITE_BITS ? bits >> 16 | 0x40 : rounded);
}

/* The bits of the float16 that is nearest to a value, ties to even; a NaN stays one. */
INLINE uint16_t to_half(float value) {
    uint32_t bits = to_bits(value) & 0x7FFFFFFF;
    uint32_t sign = to_bits(value) >> 16 & 0x8000;
    /* Below the smallest normal the sum with 0.5 has a float16's last bit as its last. */
    uint32_t subnormal = to_bits(from_bits(bits) + 0.5f) - to_bits(0.5f);
    uint32_t half = ((bits + 0xFFF + (bits >> 13 & 1)) >> 13) - (112u << 10);
    half = bits < 113u << 23 ? subnormal : half;
    half = bits >= 143u << 23 || half > 0x7C00 ? 0x7C00 : half;
    half = bits > INFINITE_BITS ? 0x7E00 : half;
    return (uint16_t)(half | sign);
}

/* What a result becomes when it is kept in a dtype, as float32. */
INLINE float rounded(float value, enum dtype dtype) {
    if (dtype == FLOAT32)
        return value;
    return dtype == BFLOAT16 ? from_bits((uint32_t)to_bfloat16(value) << 16) : to_nearest_half(value);
}

/* Write element i, rounded once. */
INLINE void store(void *x, int64_t i, float value, enum dtype dtype) {
    if (dtype == FLOAT32)
        ((float *)x)[i] = value;
    else
        ((uint16_t *)x)[i] = dtype == BFLOAT16 ? to_bfloat16(value) : to_half(value);
}

/* How many elements are made float32 at a time where that is a step of its own. */
#define BATCH 64

INLINE void load_halves(const uint16_t *halves, int64_t n, float *values) {
    int64_t i = 0;
#ifdef __AVX512F__
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(values + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(halves + i))));
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(values + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + i))));
#endif
    for (; i < n; i++)
        values[i] = from_half(halves[i]);
}

INLINE void store_halves(const float *values, int64_t n, uint16_t *halves) {
    int64_t i = 0;
#ifdef __AVX512F__
    for (; i + 16 <= n; i += 16) {
        __m512 sixteen = _mm512_loadu_ps(values + i);
        _mm256_storeu_si256((__m256i *)(halves + i), _mm512_cvtps_ph(sixteen, _MM_FROUND_TO_NEAREST_INT));
    }
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
        __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i *)(halves + i), eight);
    }
#endif
    for (; i < n; i++)
        halves[i] = to_half(values[i]);
}

/* So large a number leaves a sum no bits for a fraction: it is rounded to even, and the integer is in the low bits. */
#define ROUNDER 0x1.8p23f

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
