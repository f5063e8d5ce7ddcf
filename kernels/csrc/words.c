/* Small integers packed in words of 32 bits, and the same ones with a byte each.
 *
 * What is right are the definitions of quantdock.ops.unpack_words and pack_words. Words form streams; a stream holds its
 * codes from the lowest bit of its first word on, and a code may begin in one word and end in the next. Both sides are
 * matrices whose streams are either rows or columns, so that a matrix can be turned on the way.
 *
 * The unit of work is a block of 8 streams with 32 codes of each, which fill whole words at any number of bits. Eight codes
 * of a stream are one number of 64 bits once they have a byte each; where a matrix is turned, 8 of these are, too.
 */
#include "kernels.h"

#define STREAMS 8
#define CODES 32
#define TILE 64 /* of streams and of codes, done together: all of a cache line while it is there */

struct layout {
    int64_t stream; /* from a stream to the next, in elements */
    int64_t along;  /* from an element of a stream to the next; one of the two is 1 */
};

/* The lowest bits of each lane of 64 bits. */
INLINE uint64_t low(int bits, int lane) {
    uint64_t mask = 0;
    for (int i = 0; i < 64; i += lane)
        mask |= ((1ull << bits) - 1) << i;
    return mask;
}

/* Eight codes, from side by side to one in each byte. */
INLINE uint64_t spread(uint64_t x, int bits) {
    x = (x & low(4 * bits, 64)) | (x >> 4 * bits & low(4 * bits, 64)) << 32;
    x = (x & low(2 * bits, 32)) | (x >> 2 * bits & low(2 * bits, 32)) << 16;
    return (x & low(bits, 16)) | (x >> bits & low(bits, 16)) << 8;
}

INLINE uint64_t gather(uint64_t x, int bits) {
    x = (x & low(bits, 16)) | (x >> 8 & low(bits, 16)) << bits;
    x = (x & low(2 * bits, 32)) | (x >> 16 & low(2 * bits, 32)) << 2 * bits;
    return (x & low(4 * bits, 64)) | (x >> 32 & low(4 * bits, 64)) << 4 * bits;
}

/* The same for 4 bits in AWQ's order: the even codes are in the lower half of a word, the odd ones in the upper. */
INLINE uint64_t spread_half(uint64_t x) {
    x = (x | x << 24) & 0x000000FF000000FF;
    return (x | x << 12) & 0x000F000F000F000F;
}

INLINE uint64_t gather_half(uint64_t x) {
    x &= 0x000F000F000F000F;
    x = (x | x >> 12) & 0x000000FF000000FF;
    return (x | x >> 24) & 0xFFFF;
}

/* Turn 8 rows of 8 bytes. */
#ifdef __SSE2__
#include <emmintrin.h>

INLINE void turn(uint64_t x[STREAMS]) {
    __m128i rows[STREAMS];
    for (int i = 0; i < STREAMS; i++)
        rows[i] = _mm_loadl_epi64((const __m128i *)&x[i]);
    __m128i a = _mm_unpacklo_epi8(rows[0], rows[1]), b = _mm_unpacklo_epi8(rows[2], rows[3]);
    __m128i c = _mm_unpacklo_epi8(rows[4], rows[5]), d = _mm_unpacklo_epi8(rows[6], rows[7]);
    __m128i first = _mm_unpacklo_epi16(a, b), second = _mm_unpackhi_epi16(a, b);
    __m128i third = _mm_unpacklo_epi16(c, d), fourth = _mm_unpackhi_epi16(c, d);
    _mm_storeu_si128((__m128i *)x, _mm_unpacklo_epi32(first, third));
    _mm_storeu_si128((__m128i *)x + 1, _mm_unpackhi_epi32(first, third));
    _mm_storeu_si128((__m128i *)x + 2, _mm_unpacklo_epi32(second, fourth));
    _mm_storeu_si128((__m128i *)x + 3, _mm_unpackhi_epi32(second, fourth));
}

#else

INLINE void turn(uint64_t x[STREAMS]) {
    for (int distance = 4; distance; distance /= 2) {
        uint64_t mask = low(8 * distance, 16 * distance);
        for (int i = 0; i < STREAMS; i++) {
            if (i & distance)
                continue;
            uint64_t a = x[i], b = x[i + distance];
            x[i] = (a & mask) | (b & mask) << 8 * distance;
            x[i + distance] = (a >> 8 * distance & mask) | (b & ~mask);
        }
    }
}

#endif

/* What is there of a block, and how it is stored. All but the counts are constants where it matters. */
struct block {
    int bits;
    bool interleaved, turned; /* turned: the codes of 8 streams lie side by side */
    int streams, codes;
    struct layout words_layout, codes_layout;
};

INLINE void unpack_block(const uint32_t *words, uint8_t *codes, struct block b) {
    uint32_t w[8 + 1][STREAMS] = {0};
    int count = (b.codes * b.bits + 31) / 32;
    for (int i = 0; i < count; i++)
        for (int s = 0; s < b.streams; s++)
            w[i][s] = words[s * b.words_layout.stream + i * b.words_layout.along];
    for (int j = 0; j < b.codes; j += 8) {
        uint64_t x[STREAMS];
        int bit = j * b.bits, i = bit / 32;
        for (int s = 0; s < STREAMS; s++) {
            uint64_t pair = (w[i][s] | (uint64_t)w[i + 1][s] << 32) >> bit % 32;
            x[s] = b.interleaved ? spread_half(pair & 0xFFFF) | spread_half(pair >> 16 & 0xFFFF) << 8 : spread(pair, b.bits);
        }
        if (b.turned)
            turn(x);
        int numbers = b.turned ? b.codes - j : b.streams, bytes = b.turned ? b.streams : b.codes - j;
        int64_t step = b.turned ? b.codes_layout.along : b.codes_layout.stream;
        uint8_t *out = codes + j * b.codes_layout.along;
        for (int n = 0; n < STREAMS && n < numbers; n++)
            memcpy(out + n * step, &x[n], (size_t)(bytes < 8 ? bytes : 8));
    }
}

INLINE void pack_block(uint32_t *words, const uint8_t *codes, struct block b) {
    uint32_t w[8 + 1][STREAMS] = {0};
    for (int j = 0; j < b.codes; j += 8) {
        uint64_t x[STREAMS] = {0};
        int numbers = b.turned ? b.codes - j : b.streams, bytes = b.turned ? b.streams : b.codes - j;
        int64_t step = b.turned ? b.codes_layout.along : b.codes_layout.stream;
        const uint8_t *in = codes + j * b.codes_layout.along;
        for (int n = 0; n < STREAMS && n < numbers; n++)
            memcpy(&x[n], in + n * step, (size_t)(bytes < 8 ? bytes : 8));
        if (b.turned)
            turn(x);
        int bit = j * b.bits, i = bit / 32;
        for (int s = 0; s < STREAMS; s++) {
            uint64_t packed = b.interleaved ? gather_half(x[s]) | gather_half(x[s] >> 8) << 16 : gather(x[s], b.bits);
            /* No code spans more than two words, nor do eight. */
            w[i][s] |= (uint32_t)(packed << bit % 32);
            w[i + 1][s] |= (uint32_t)(packed << bit % 32 >> 32);
        }
    }
    int count = (b.codes * b.bits + 31) / 32;
    for (int i = 0; i < count; i++)
        for (int s = 0; s < b.streams; s++)
            words[s * b.words_layout.stream + i * b.words_layout.along] = w[i][s];
}

INLINE void convert_block(bool pack, uint32_t *words, uint8_t *codes, struct block b) {
    if (pack)
        pack_block(words, codes, b);
    else
        unpack_block(words, codes, b);
}

INLINE void convert(
    bool pack, uint32_t *words, uint8_t *codes, int64_t streams, int64_t length, struct block b) {
    for (int64_t tile_s = 0; tile_s < streams; tile_s += TILE)
        for (int64_t tile_j = 0; tile_j < length; tile_j += TILE)
            for (int64_t s = tile_s; s < tile_s + TILE && s < streams; s += STREAMS)
                for (int64_t j = tile_j; j < tile_j + TILE && j < length; j += CODES) {
                    uint32_t *in = words + s * b.words_layout.stream + j / 32 * b.bits * b.words_layout.along;
                    uint8_t *out = codes + s * b.codes_layout.stream + j * b.codes_layout.along;
                    if (streams - s >= STREAMS && length - j >= CODES) {
                        b.streams = STREAMS, b.codes = CODES;
                        convert_block(pack, in, out, b);
                    } else {
                        struct block rest = b;
                        rest.streams = streams - s < STREAMS ? (int)(streams - s) : STREAMS;
                        rest.codes = length - j < CODES ? (int)(length - j) : CODES;
                        convert_block(pack, in, out, rest);
                    }
                }
}

/* A loop for each number of bits and each layout. */
INLINE void choose(
    bool pack, uint32_t *words, uint8_t *codes, int64_t streams, int64_t length, int64_t word_stride,
    int64_t code_stride, int bits, int words_in_columns, int codes_in_columns, int interleaved) {
    struct layout columns_of_words = {1, word_stride}, rows_of_words = {word_stride, 1};
    struct layout columns_of_codes = {1, code_stride}, rows_of_codes = {code_stride, 1};
#define CONVERT(bits, interleaved)                                                                                             \
    do {                                                                                                               \
        if (words_in_columns && codes_in_columns)                                                                      \
            convert(                                                                                                   \
                pack, words, codes, streams, length,                                                                   \
                (struct block){bits, interleaved, true, 0, 0, columns_of_words, columns_of_codes});                            \
        else if (words_in_columns)                                                                                     \
            convert(                                                                                                   \
                pack, words, codes, streams, length,                                                                   \
                (struct block){bits, interleaved, false, 0, 0, columns_of_words, rows_of_codes});                              \
        else if (codes_in_columns)                                                                                     \
            convert(                                                                                                   \
                pack, words, codes, streams, length,                                                                   \
                (struct block){bits, interleaved, true, 0, 0, rows_of_words, columns_of_codes});                               \
        else                                                                                                           \
            convert(                                                                                                   \
                pack, words, codes, streams, length,                                                                   \
                (struct block){bits, interleaved, false, 0, 0, rows_of_words, rows_of_codes});                                 \
    } while (0)
    if (interleaved)
        CONVERT(4, true);
    else if (bits == 2)
        CONVERT(2, false);
    else if (bits == 3)
        CONVERT(3, false);
    else if (bits == 4)
        CONVERT(4, false);
    else
        CONVERT(8, false);
}

KERNEL(void, unpack_words)(
    const uint32_t *words, int64_t streams, int64_t length, int64_t word_stride, int64_t code_stride, int bits,
    int words_in_columns, int codes_in_columns, int interleaved, uint8_t *codes) {
    choose(
        false, (uint32_t *)words, codes, streams, length, word_stride, code_stride, bits, words_in_columns,
        codes_in_columns, interleaved);
}

KERNEL(void, pack_words)(
    const uint8_t *codes, int64_t streams, int64_t length, int64_t word_stride, int64_t code_stride, int bits,
    int words_in_columns, int codes_in_columns, int interleaved, uint32_t *words) {
    choose(
        true, words, (uint8_t *)codes, streams, length, word_stride, code_stride, bits, words_in_columns,
        codes_in_columns, interleaved);
}
