// SPDX-License-Identifier: Apache-2.0
// One head of one text: softmax(q kᵀ / sqrt(d) + bias) v. Keys and values are laid out in panels, so that
// the products are those of the linear layers.
#pragma once
#include <string.h>

#include "rows.hpp"

struct Head {
    const float *q, *k, *v;  // rows of d, `stride` apart
    size_t stride;
    int length, d;
    const float* bias;  // of the first row, added to scores by key; the next row's begins one before. Or null
    float* out;
    size_t out_stride;
};

// Floats of scratch for a head of so many keys.
static inline size_t attention_scratch(size_t keys, size_t d) {
    keys = (keys + PANEL - 1) / PANEL * PANEL;
    return keys * (2 * d + MOST_ROWS);
}

static inline void attend(const Head& h, float* scratch) {
    const int length = h.length, d = h.d, keys = (length + PANEL - 1) / PANEL;
    const size_t line = (size_t)keys * PANEL;
    float *key_panels = scratch, *value_panels = key_panels + line * d, *scores = value_panels + line * d;
    for (int j = 0; j < keys; j++)
        for (int i = 0; i < d; i++) {
            float* lane = key_panels + ((size_t)j * d + i) * PANEL;
            for (int n = 0; n < PANEL; n++) {
                int key = j * PANEL + n;
                lane[n] = key < length ? h.k[key * h.stride + i] : 0;
            }
        }
    for (int j = 0; j < d / PANEL; j++)
        for (int n = 0; n < length; n++)
            memcpy(value_panels + ((size_t)j * length + n) * PANEL, h.v + n * h.stride + j * PANEL,
                   PANEL * sizeof(float));
    const float scale = 1 / __builtin_sqrtf((float)d);
    for (int row = 0; row < length; row += MOST_ROWS) {
        int count = length - row < MOST_ROWS ? length - row : MOST_ROWS;
        for (int j = 0; j < keys; j++)
            by_tiles(Product<Float32>{h.q + row * h.stride, h.stride, (const char*)(key_panels + (size_t)j * d * PANEL), d},
                     count, [&](int r, int c, f32 y) { store(scores + r * line + j * PANEL + c, y); });
        float inverse[MOST_ROWS];
        for (int r = 0; r < count; r++)
            inverse[r] = 1 / softmax(scores + r * line, length, scale, h.bias ? h.bias - (row + r) : nullptr);
        for (int j = 0; j < d / PANEL; j++)
            by_tiles(Product<Float32>{scores, line, (const char*)(value_panels + (size_t)j * length * PANEL), length},
                     count, [&](int r, int c, f32 y) {
                store(h.out + (row + r) * h.out_stride + j * PANEL + c, _mm512_mul_ps(y, set(inverse[r])));
            });
    }
}

// The largest size of `rows` rows of d numbers; NaN, if there is one.
static inline float largest(const float* x, size_t stride, int rows, int d) {
    __m512i high = _mm512_setzero_si512();  // as integers floats are in the same order, NaN above all
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < d; i += 16)
            high = _mm512_max_epi32(high, _mm512_castps_si512(_mm512_abs_ps(load(x + r * stride + i))));
    int bits = _mm512_reduce_max_epi32(high);
    float size;
    memcpy(&size, &bits, 4);
    return size < 1e-30f ? 1e-30f : size;
}

static INLINE __m512i whole(const float* x, float by) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(load(x), set(by)));
}

// The same in int16, q, k and v each with one scale for all rows of the text, as large as sums of 32 bits
// allow. (In int8 most of what a softmax gives would be 0.)
static inline void attend_int16(const Head& h, float* scratch) {
    const int length = h.length, d = h.d, keys = (length + PANEL - 1) / PANEL;
    const int pairs = (length + 1) / 2, lanes = d / 2;
    const size_t line = (size_t)keys * PANEL;
    int32_t *scores = (int32_t*)scratch, *q = scores + MOST_ROWS * line;
    int32_t *key_panels = q + (size_t)length * lanes, *value_panels = key_panels + line * lanes;

    float q_size = largest(h.q, h.stride, length, d), k_size = largest(h.k, h.stride, length, d);
    float most = __builtin_sqrtf((1u << 31) / (float)d) - 1;  // products of d numbers are summed up
    for (int n = 0; n < length; n++) {
        int32_t* lane = key_panels + (size_t)(n / PANEL) * lanes * PANEL + n % PANEL;
        for (int i = 0; i < d; i += 16) {
            const float* from = h.q + n * h.stride + i;
            _mm256_storeu_si256((__m256i*)(q + (size_t)n * lanes + i / 2),
                                _mm512_cvtepi32_epi16(whole(from, most / q_size)));
            int32_t eight[8];
            from = h.k + n * h.stride + i;
            _mm256_storeu_si256((__m256i*)eight, _mm512_cvtepi32_epi16(whole(from, most / k_size)));
            for (int j = 0; j < 8; j++, lane += PANEL) *lane = eight[j];
        }
    }
    const float scale = q_size / most * (k_size / most) / __builtin_sqrtf((float)d);

    // Two keys' values side by side; each is weighed by up to 4096.
    float v_size = largest(h.v, h.stride, length, d);
    most = (float)((1 << 19) / length - 1);
    if (most > 32767) most = 32767;
    for (int p = 0; p < pairs; p++) {
        const float *even = h.v + 2 * p * h.stride, *odd = 2 * p + 1 < length ? even + h.stride : even;
        for (int i = 0; i < d; i += 16) {
            int32_t* to = value_panels + ((size_t)(i / PANEL) * pairs + p) * PANEL + i % PANEL;
            _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaa, whole(even + i, most / v_size),
                                                            _mm512_slli_epi32(whole(odd + i, most / v_size), 16)));
        }
    }

    for (int row = 0; row < length; row += MOST_ROWS) {
        int count = length - row < MOST_ROWS ? length - row : MOST_ROWS;
        for (int j = 0; j < keys; j++)
            by_tiles(Product<Int16>{q + (size_t)row * lanes, (size_t)lanes,
                                    (const char*)(key_panels + (size_t)j * lanes * PANEL), lanes}, count,
                     [&](int r, int c, __m512i y) { _mm512_storeu_si512(scores + r * line + j * PANEL + c, y); });
        float by[MOST_ROWS];
        for (int r = 0; r < count; r++)
            by[r] = v_size / most / softmax_int16(scores + r * line, length, scale,
                                                  h.bias ? h.bias - (row + r) : nullptr);
        for (int j = 0; j < d / PANEL; j++)
            by_tiles(Product<Int16>{scores, line, (const char*)(value_panels + (size_t)j * pairs * PANEL), pairs},
                     count, [&](int r, int c, __m512i y) {
                store(h.out + (row + r) * h.out_stride + j * PANEL + c, _mm512_mul_ps(_mm512_cvtepi32_ps(y), set(by[r])));
            });
    }
}
