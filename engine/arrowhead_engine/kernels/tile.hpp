// SPDX-License-Identifier: Apache-2.0
// The product y = x Wᵀ, by tiles. One loop serves every number format.
//
// A format puts G numbers of a row side by side in a 32-bit lane (float32 1, bfloat16 2, int8 4), and
// AVX-512 has for each format an instruction that multiplies lanes and adds up in lanes. So the loop
// is the same for all: broadcast a lane of x, multiply it with 32 columns of Wᵀ.
//
// W [out, in] is laid out anew at load, in panels of 32 outputs: for each lane of the inputs, its 32
// lanes side by side. A tile is at most 12 rows of x by one panel: 24 registers of sums, 2 of W.
#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define INLINE inline __attribute__((always_inline))

constexpr int PANEL = 32;      // outputs: two registers
constexpr int MOST_ROWS = 12;  // of a tile
constexpr int AHEAD = 1024;    // bytes of a panel fetched in advance: 5 % of a short text's time

using f32 = __m512;
static INLINE f32 set(float x) { return _mm512_set1_ps(x); }
static INLINE f32 load(const float* p) { return _mm512_loadu_ps(p); }
static INLINE void store(float* p, f32 x) { _mm512_storeu_ps(p, x); }
static INLINE f32 widened(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}

struct Float32 {
    using Lane = float;  // of x
    using Sum = __m512;
    static constexpr int LANE_BYTES = 4;  // of W
    static INLINE __m512 weights(const char* p) { return load((const float*)p); }
    static INLINE Sum add(Sum s, float x, __m512 w) { return _mm512_fmadd_ps(set(x), w, s); }
};

// W stays float16, as most files store it, and is widened on its way: exact, and half the traffic.
struct Float16 : Float32 {
    static constexpr int LANE_BYTES = 2;
    static INLINE __m512 weights(const char* p) { return widened((const uint16_t*)p); }
};

struct Narrow32 {  // numbers side by side in lanes of 32 bits
    using Lane = int32_t;
    static constexpr int LANE_BYTES = 4;
    static INLINE __m512i weights(const char* p) { return _mm512_loadu_si512(p); }
};

struct Bfloat16 : Narrow32 {
    using Sum = __m512;
    static INLINE Sum add(Sum s, int32_t x, __m512i w) {
        return _mm512_dpbf16_ps(s, (__m512bh)_mm512_set1_epi32(x), (__m512bh)w);
    }
};

// x is unsigned, W signed: that is how the instruction wants it.
struct Int8 : Narrow32 {
    using Sum = __m512i;
    static INLINE Sum add(Sum s, int32_t x, __m512i w) {
        return _mm512_dpbusd_epi32(s, _mm512_set1_epi32(x), w);
    }
};

struct Int16 : Narrow32 {
    using Sum = __m512i;
    static INLINE Sum add(Sum s, int32_t x, __m512i w) {
        return _mm512_dpwssd_epi32(s, _mm512_set1_epi32(x), w);
    }
};

template <class Format, int ROWS>
INLINE void dot(typename Format::Sum (&sums)[ROWS][2], const typename Format::Lane* x, size_t stride,
                const char* panel, int lanes) {
    for (int k = 0; k < lanes; k++, panel += PANEL * Format::LANE_BYTES) {
        _mm_prefetch(panel + AHEAD, _MM_HINT_T0);
        if (Format::LANE_BYTES == 4) _mm_prefetch(panel + AHEAD + 64, _MM_HINT_T0);
        auto left = Format::weights(panel), right = Format::weights(panel + 16 * Format::LANE_BYTES);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            auto lane = x[r * stride + k];
            sums[r][0] = Format::add(sums[r][0], lane, left);
            sums[r][1] = Format::add(sums[r][1], lane, right);
        }
    }
}

// x [rows, lanes] by a panel of W, rows `stride` lanes apart.
template <class Format>
struct Product {
    const typename Format::Lane* x;
    size_t stride;
    const char* panel;
    int lanes;

    template <int ROWS, class Done>
    INLINE void tile(int first, const Done& done) const {
        typename Format::Sum sums[ROWS][2] = {};
        dot<Format, ROWS>(sums, x + first * stride, stride, panel, lanes);
#pragma unroll
        for (int r = 0; r < ROWS; r++) done(first + r, 0, sums[r][0]), done(first + r, 16, sums[r][1]);
    }
};

// The same in int8, where every `group` inputs have a scale of their own, in x and in W:
// y = sum over groups of  sx * sw * dot(q - zero, w)  =  sx * (sw * dot(q, w)) - (sx * zero) * (sw * sum(w)).
struct Int8Product {
    const int32_t* x;
    size_t stride;
    const char* panel;
    int lanes, groups;
    const float* row_scales;    // [rows, groups, 2]: sx, and sx * zero
    const float* panel_scales;  // [groups, 2, 32]: sw, and sw * sum(w)

    template <int ROWS, class Done>
    INLINE void tile(int first, const Done& done) const {
        f32 totals[ROWS][2] = {};
        int of_group = lanes / groups;
        for (int g = 0; g < groups; g++) {
            __m512i sums[ROWS][2] = {};
            dot<Int8, ROWS>(sums, x + first * stride + g * of_group, stride,
                            panel + (size_t)g * of_group * PANEL * Int8::LANE_BYTES, of_group);
            const float* sw = panel_scales + g * 2 * PANEL;
            const float* sx = row_scales + ((size_t)first * groups + g) * 2;
#pragma unroll
            for (int r = 0; r < ROWS; r++, sx += 2 * groups)
                for (int h = 0; h < 2; h++) {
                    f32 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][h]), load(sw + 16 * h));
                    f32 t = _mm512_fmadd_ps(y, set(sx[0]), totals[r][h]);
                    totals[r][h] = _mm512_fnmadd_ps(load(sw + PANEL + 16 * h), set(sx[1]), t);
                }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) done(first + r, 0, totals[r][0]), done(first + r, 16, totals[r][1]);
    }
};

// All rows, in tiles of nearly the same height; `done(row, column, y)` takes 16 columns at a time.
template <class P, class Done>
inline void by_tiles(const P& product, int rows, const Done& done) {
    int tiles = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int t = 0, first = 0, next; t < tiles; t++, first = next) {
        next = (int)((int64_t)rows * (t + 1) / tiles);
        switch (next - first) {
            case 1: product.template tile<1>(first, done); break;
            case 2: product.template tile<2>(first, done); break;
            case 3: product.template tile<3>(first, done); break;
            case 4: product.template tile<4>(first, done); break;
            case 5: product.template tile<5>(first, done); break;
            case 6: product.template tile<6>(first, done); break;
            case 7: product.template tile<7>(first, done); break;
            case 8: product.template tile<8>(first, done); break;
            case 9: product.template tile<9>(first, done); break;
            case 10: product.template tile<10>(first, done); break;
            case 11: product.template tile<11>(first, done); break;
            default: product.template tile<12>(first, done);
        }
    }
}
