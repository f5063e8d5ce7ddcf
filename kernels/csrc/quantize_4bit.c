/* 4-bit blockwise quantization: a scale per block, and a code per element found among 15 decision bounds.
 *
 * What is right is the definition of quantdock.ops.quantize_blockwise_4bit; for bitsandbytes' bounds it gives the bits of
 * bitsandbytes. A value's rank is the number of bounds that it isn't at or below, so that of a NaN is 15.
 */
#include "kernels.h"

/* The reciprocal of anything smaller would be infinite. */
#define SMALLEST_SCALE 1e-38f

/* Every processor that matters has vectors of 16 bytes; gcc and clang both compile these types to them. */
typedef float floats __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(16)));
#define VECTORS 4 /* in flight at a time, which fit the registers */

/* The codes of up to BATCH elements, two to a byte, the first in the high half; an odd one is paired with a zero's. */
INLINE void encode(
    const void *x, int64_t n, enum dtype dtype, float scale, bool divide, const float *bounds, const uint8_t *codes,
    uint8_t *packed) {
    float values[BATCH] = {0};
    uint32_t found[BATCH];
    for (int64_t i = 0; i < n; i++)
        values[i] = divide ? load(x, i, dtype) / scale : load(x, i, dtype) * scale;
    for (int i = 0; i < BATCH; i += 4 * VECTORS) {
        floats value[VECTORS];
        words code[VECTORS];
        memcpy(value, values + i, sizeof value);
        for (int v = 0; v < VECTORS; v++)
            code[v] = (words){0} + codes[0];
        /* Each bound that a value passes changes the code; a table lookup would not be vectorised. */
        for (int k = 0; k < 15; k++) {
            floats bound = {bounds[k], bounds[k], bounds[k], bounds[k]};
            words change = (words){0} + ((uint32_t)codes[k + 1] - codes[k]);
            for (int v = 0; v < VECTORS; v++)
                code[v] += ~(words)(value[v] <= bound) & change;
        }
        memcpy(found + i, code, sizeof code);
    }
    for (int64_t i = 0; i < (n + 1) / 2; i++)
        packed[i] = (uint8_t)(found[2 * i] << 4 | found[2 * i + 1]);
}

/* Faster ways for 32 elements at a time: whole blocks, values times a factor. Each finds ranks by a binary search whose
 * tables are registers, in the even and the odd elements apart, so that the halves of a byte meet in one lane. */
#if defined(__AVX512BW__)
#include <immintrin.h>

struct tables {
    __m512 first, second_low, second_high, third, fourth;
    __m512i high_codes, low_codes;
};

INLINE struct tables make_tables(const float *bounds, const uint8_t *codes) {
    float third[16], fourth[16];
    int32_t low[16], high[16];
    for (int rank = 0; rank < 16; rank++) {
        third[rank] = bounds[(rank & 12) + 1];
        fourth[rank] = bounds[rank & 14];
        low[rank] = codes[rank];
        high[rank] = codes[rank] << 4;
    }
    struct tables tables = {
        _mm512_set1_ps(bounds[7]), _mm512_set1_ps(bounds[3]), _mm512_set1_ps(bounds[11]),
        _mm512_loadu_ps(third),    _mm512_loadu_ps(fourth),   _mm512_loadu_si512(high),
        _mm512_loadu_si512(low),
    };
    return tables;
}

INLINE __m512i ranks(__m512 values, const struct tables *t) {
    __mmask16 above = _mm512_cmp_ps_mask(values, t->first, _CMP_NLE_UQ);
    __m512i rank = _mm512_maskz_set1_epi32(above, 8);
    __m512 bound = _mm512_mask_blend_ps(above, t->second_low, t->second_high);
    above = _mm512_cmp_ps_mask(values, bound, _CMP_NLE_UQ);
    rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(4));
    above = _mm512_cmp_ps_mask(values, _mm512_permutexvar_ps(rank, t->third), _CMP_NLE_UQ);
    rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(2));
    above = _mm512_cmp_ps_mask(values, _mm512_permutexvar_ps(rank, t->fourth), _CMP_NLE_UQ);
    return _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(1));
}

INLINE void encode_32(
    const void *x, enum dtype dtype, float factor, const struct tables *t, uint8_t *packed) {
    __m512 even, odd;
    if (dtype == BFLOAT16) {
        __m512i both = _mm512_loadu_si512(x);
        even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)));
    } else {
        __m512 first, second;
        if (dtype == FLOAT16) {
            first = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
            second = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x + 1));
        } else {
            first = _mm512_loadu_ps(x);
            second = _mm512_loadu_ps((const float *)x + 16);
        }
        even = _mm512_shuffle_ps(first, second, 0x88);
        odd = _mm512_shuffle_ps(first, second, 0xDD);
    }
    __m512 factors = _mm512_set1_ps(factor);
    __m512i high = _mm512_permutexvar_epi32(ranks(_mm512_mul_ps(even, factors), t), t->high_codes);
    __m512i low = _mm512_permutexvar_epi32(ranks(_mm512_mul_ps(odd, factors), t), t->low_codes);
    __m128i bytes = _mm512_cvtepi32_epi8(_mm512_or_si512(high, low));
    if (dtype != BFLOAT16) /* the shuffles took two pairs of the first vector, two of the second, and so on */
        bytes = _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    _mm_storeu_si128((__m128i *)packed, bytes);
}

#elif defined(__AVX2__)
#include <immintrin.h>

struct tables {
    __m256 first, second_low, second_high, third, fourth;
    __m128i high_codes, low_codes;
};

INLINE struct tables make_tables(const float *bounds, const uint8_t *codes) {
    /* Ranks are negative while they grow, as comparisons give -1: entry -k modulo 8 is for the k-th interval. */
    float third[8], fourth[8];
    uint8_t high[16];
    for (int k = 0; k < 8; k++) {
        third[-k & 7] = bounds[4 * (k & 3) + 1];
        fourth[-k & 7] = bounds[2 * k];
    }
    for (int rank = 0; rank < 16; rank++)
        high[rank] = (uint8_t)(codes[rank] << 4);
    struct tables tables = {
        _mm256_set1_ps(bounds[7]),
        _mm256_set1_ps(bounds[3]),
        _mm256_set1_ps(bounds[11]),
        _mm256_loadu_ps(third),
        _mm256_loadu_ps(fourth),
        _mm_loadu_si128((const __m128i *)high),
        _mm_loadu_si128((const __m128i *)codes),
    };
    return tables;
}

INLINE __m256i double_and_add(__m256i rank, __m256 above) {
    return _mm256_add_epi32(_mm256_add_epi32(rank, rank), _mm256_castps_si256(above));
}

INLINE __m256i negative_ranks(__m256 values, const struct tables *t) {
    __m256 above = _mm256_cmp_ps(values, t->first, _CMP_NLE_UQ);
    __m256 bound = _mm256_blendv_ps(t->second_low, t->second_high, above);
    __m256i rank = double_and_add(_mm256_castps_si256(above), _mm256_cmp_ps(values, bound, _CMP_NLE_UQ));
    bound = _mm256_permutevar8x32_ps(t->third, rank);
    rank = double_and_add(rank, _mm256_cmp_ps(values, bound, _CMP_NLE_UQ));
    bound = _mm256_permutevar8x32_ps(t->fourth, rank);
    return double_and_add(rank, _mm256_cmp_ps(values, bound, _CMP_NLE_UQ));
}

/* Eight lanes, each with 16 * (rank of an even element) + (rank of the odd one after it). */
INLINE __m256i rank_pairs(const void *x, enum dtype dtype, float factor, const struct tables *t) {
    __m256 even, odd;
    if (dtype == BFLOAT16) {
        __m256i both = _mm256_loadu_si256((const __m256i *)x);
        even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-65536)));
    } else {
        __m256 first, second;
        if (dtype == FLOAT16) {
            first = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
            second = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x + 1));
        } else {
            first = _mm256_loadu_ps(x);
            second = _mm256_loadu_ps((const float *)x + 8);
        }
        even = _mm256_shuffle_ps(first, second, 0x88);
        odd = _mm256_shuffle_ps(first, second, 0xDD);
    }
    __m256 factors = _mm256_set1_ps(factor);
    __m256i high = _mm256_slli_epi32(negative_ranks(_mm256_mul_ps(even, factors), t), 4);
    __m256i low = negative_ranks(_mm256_mul_ps(odd, factors), t);
    __m256i pairs = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_add_epi32(high, low));
    /* The shuffles took two pairs of the first vector, two of the second, and so on. */
    return dtype == BFLOAT16 ? pairs : _mm256_permute4x64_epi64(pairs, 0xD8);
}

INLINE void encode_32(
    const void *x, enum dtype dtype, float factor, const struct tables *t, uint8_t *packed) {
    __m256i first = rank_pairs(x, dtype, factor, t);
    __m256i second = rank_pairs(at(x, 16, dtype), dtype, factor, t);
    __m256i words = _mm256_packs_epi32(first, second);
    __m256i halves = _mm256_packus_epi16(words, words); /* four bytes of the first and four of the second, twice */
    __m128i bytes = _mm_unpacklo_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    __m128i nibble = _mm_set1_epi8(15);
    __m128i high = _mm_shuffle_epi8(t->high_codes, _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble));
    __m128i low = _mm_shuffle_epi8(t->low_codes, _mm_and_si128(bytes, nibble));
    _mm_storeu_si128((__m128i *)packed, _mm_or_si128(high, low));
}

#endif

INLINE void quantize(
    const void *x, enum dtype dtype, int64_t count, int64_t blocksize, const float *bounds, const uint8_t *codes,
    uint8_t *packed, float *absmax) {
#ifdef __AVX2__
    const struct tables tables = make_tables(bounds, codes);
#endif
    for (int64_t start = 0; start < count; start += blocksize) {
        bool whole = count - start >= blocksize;
        int64_t n = whole ? blocksize : count - start;
        const void *block = at(x, start, dtype);
        float largest = largest_magnitude(block, n, dtype);
        /* Not for a NaN, which stays. */
        float scale = largest < SMALLEST_SCALE ? SMALLEST_SCALE : largest;
        float factor = 1.0f / scale;
        *absmax++ = whole ? largest : scale;
        int64_t i = 0;
#ifdef __AVX2__
        for (; whole && i + 32 <= n; i += 32)
            encode_32(at(block, i, dtype), dtype, factor, &tables, packed + (start + i) / 2);
#endif
        for (; i < n; i += BATCH) {
            int64_t size = n - i < BATCH ? n - i : BATCH;
            const void *part = at(block, i, dtype);
            uint8_t *out = packed + (start + i) / 2;
            if (whole)
                encode(part, size, dtype, factor, false, bounds, codes, out);
            else
                encode(part, size, dtype, scale, true, bounds, codes, out);
        }
    }
}

KERNEL(void, quantize_4bit)(
    const void *x, int dtype, int64_t count, int64_t blocksize, const float *bounds, const uint8_t *codes,
    uint8_t *packed, float *absmax) {
    if (dtype == FLOAT32)
        quantize(x, FLOAT32, count, blocksize, bounds, codes, packed, absmax);
    else if (dtype == BFLOAT16)
        quantize(x, BFLOAT16, count, blocksize, bounds, codes, packed, absmax);
    else
        quantize(x, FLOAT16, count, blocksize, bounds, codes, packed, absmax);
}
