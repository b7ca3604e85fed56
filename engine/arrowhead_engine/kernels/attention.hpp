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
            memcpy(value_panels + ((size_t)j * length + n) * PANEL, h.v + n * h.stride + j * PANEL, PANEL * sizeof(float));
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

static INLINE __m512i whole(const float* x, f32 by) { return _mm512_cvtps_epi32(_mm512_mul_ps(load(x), by)); }

// The same, q and k in int8, v and the softmax in int16, each with one scale for all rows of the text: next
// to what int8 costs the linear layers, no loss. (In int8 the many small numbers of a softmax would be 0.)
static inline void attend_int8(const Head& h, float* scratch) {
    const int length = h.length, d = h.d, keys = (length + PANEL - 1) / PANEL, pairs = (length + 1) / 2;
    const size_t line = (size_t)keys * PANEL, lanes = d / 4;
    int32_t *scores = (int32_t*)scratch, *shift = scores + MOST_ROWS * line;
    int32_t *value_panels = shift + line, *key_panels = value_panels + (size_t)pairs * d;
    uint8_t* q = (uint8_t*)(key_panels + line * lanes);

    // q is to be unsigned: 128 is added, and 128 times the sum of each key subtracted from its scores.
    float q_size = largest(h.q, h.stride, length, d), k_size = largest(h.k, h.stride, length, d);
    f32 q_by = set(127 / q_size), k_by = set(127 / k_size);
    for (int n = 0; n < length; n++) {
        int32_t* lane = key_panels + n / PANEL * lanes * PANEL + n % PANEL;
        for (int i = 0; i < d; i += 16) {
            __m512i numbers = _mm512_add_epi32(whole(h.q + n * h.stride + i, q_by), _mm512_set1_epi32(128));
            _mm_storeu_si128((__m128i*)(q + (size_t)n * d + i), _mm512_cvtepi32_epi8(numbers));
            int32_t four[4];
            _mm_storeu_si128((__m128i*)four, _mm512_cvtepi32_epi8(whole(h.k + n * h.stride + i, k_by)));
            for (int j = 0; j < 4; j++, lane += PANEL) *lane = four[j];
        }
    }
    memset(q + (size_t)length * d, 128, d);
    auto products = [&](const uint8_t* rows, int count, int32_t* to) {
        for (int j = 0; j < keys; j++)
            by_tiles(Product<Int8>{(const int32_t*)rows, lanes, (const char*)(key_panels + j * lanes * PANEL), (int)lanes},
                     count, [&](int r, int c, __m512i y) { _mm512_storeu_si512(to + r * line + j * PANEL + c, y); });
    };
    products(q + (size_t)length * d, 1, shift);

    // Two keys' values side by side; as large as the sum of all, each weighed by up to 4096, allows.
    float v_size = largest(h.v, h.stride, length, d), most = (float)((1 << 19) / length - 1);
    if (most > 32767) most = 32767;
    f32 v_by = set(most / v_size);
    for (int p = 0; p < pairs; p++) {
        const float *even = h.v + 2 * p * h.stride, *odd = 2 * p + 1 < length ? even + h.stride : even;
        for (int i = 0; i < d; i += 16) {
            int32_t* to = value_panels + ((size_t)(i / PANEL) * pairs + p) * PANEL + i % PANEL;
            _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaa, whole(even + i, v_by),
                                                            _mm512_slli_epi32(whole(odd + i, v_by), 16)));
        }
    }

    const float scale = q_size * k_size / (127 * 127 * __builtin_sqrtf((float)d));
    for (int row = 0; row < length; row += MOST_ROWS) {
        int count = length - row < MOST_ROWS ? length - row : MOST_ROWS;
        products(q + (size_t)row * d, count, scores);
        float by[MOST_ROWS];
        for (int r = 0; r < count; r++)
            by[r] = v_size / most / softmax_int16(scores + r * line, shift, length, scale,
                                                  h.bias ? h.bias - (row + r) : nullptr);
        for (int j = 0; j < d / PANEL; j++)
            by_tiles(Product<Int16>{scores, line, (const char*)(value_panels + (size_t)j * pairs * PANEL), pairs},
                     count, [&](int r, int c, __m512i y) {
                store(h.out + (row + r) * h.out_stride + j * PANEL + c, _mm512_mul_ps(_mm512_cvtepi32_ps(y), set(by[r])));
            });
    }
}
