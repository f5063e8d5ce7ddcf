/* From 8-bit floats to float32. */
#ifndef QUANTDOCK_FP8_H
#define QUANTDOCK_FP8_H

#include "kernels.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

/* The numbers are part of the interface. */
enum format { E4M3FN = 0, E5M2 = 1 };

#define E4M3_NAN 0x7F    /* without its sign */
#define E4M3_UNIT 256.0f /* the exponents of E4M3FN are 8 lower than those of float16 */
#define SIXTEEN 16

typedef float sixteen __attribute__((vector_size(4 * SIXTEEN)));

INLINE float from_fp8(uint8_t code, enum format format) {
    if (format == E5M2)
        return from_half((uint16_t)((uint32_t)code << 8));
    uint32_t low = code & 0x7Fu;
    float subnormal = (float)(int32_t)low * 0x1p-9f;
    uint32_t bits = (low << 20) + (120u << 23);
    bits = low < 8 ? to_bits(subnormal) : bits;
    bits = low == E4M3_NAN ? 0x7FC00000 : bits;
    return from_bits(bits | (uint32_t)(code & 0x80u) << 24);
}

/* What sixteen codes stand for; for E4M3FN in units of E4M3_UNIT, and some number for the codes of a NaN. */
INLINE sixteen numbers_of(const uint8_t *codes, enum format format) {
    sixteen values;
#ifdef __AVX2__
    /* The bits of a code, where a float16 has them. */
    __m256i halves = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)codes));
    if (format == E4M3FN) /* whose sign is in bits 14 and 15 then */
        halves = _mm256_and_si256(_mm256_slli_epi16(halves, 7), _mm256_set1_epi16((short)0xBFFF));
    else
        halves = _mm256_slli_epi16(halves, 8);
#ifdef __AVX512F__
    values = (sixteen)_mm512_cvtph_ps(halves);
#else
    __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
    memcpy(&values, &low, sizeof low);
    memcpy((char *)&values + sizeof low, &high, sizeof high);
#endif
#else
    for (int i = 0; i < SIXTEEN; i++)
        values[i] = from_fp8(codes[i], format) * (format == E4M3FN ? 1 / E4M3_UNIT : 1);
#endif
    return values;
}

#endif
