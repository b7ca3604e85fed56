// SPDX-License-Identifier: Apache-2.0
// BERT and its kin on packed tokens, for processors with AVX-512 and VNNI: ids in, vectors out.
//
// Nothing is padded, and nothing depends on the neighbours: a text's vector comes out the same, bit
// for bit, alone and in any company. arrowhead_engine/native.py calls the functions at the end.
#include "attention.hpp"
#include "linear.hpp"
#include "team.hpp"

enum Pooling { MEAN, CLS, MAX, MEAN_SQRT_LEN, WEIGHTED_MEAN, LAST };

struct Norm {
    const float *weight, *bias;
};

struct Layer {
    Linear *qkv, *mixed, *up, *down;
    Norm attention, output;
};

// What the caller tells of a network; all that it points to stays the caller's.
struct Plan {
    int width, heads, wide, layers;
    int words_format;
    int most;                  // tokens of a text
    float eps;
    const void* words;         // [vocabulary, width], the map itself
    const float* word_scales;  // [vocabulary] of int8 rows, else null
    const float* positions;    // [most, width]
    const float* distances;    // [heads, 2 most - 1], added to scores by key - query + most - 1, or null
    Norm embeddings;
    const Layer* layer;
};

struct Texts {
    int count;
    const int32_t *ids, *lengths;
    const int32_t* skips;  // tokens at the beginning of each text that do not count, or null
    int poolings;
    const int32_t* pooling;
    float* out;     // [count, poolings, width]
    int* starts;    // of each text in ids
};

struct Chunk {
    int first, last;  // texts
    int start, rows;  // their tokens
};

// What a chunk's rows need on their way; one for each thread.
struct Workspace {
    size_t bytes = 0;
    char* memory = nullptr;
    float *x, *qkv, *mixed, *wide, *scratch;
    Narrow small;

    bool reserve(const Plan& plan, int rows, int longest) {
        size_t d = plan.width, w = plan.wide > plan.width ? plan.wide : plan.width, m = rows;
        size_t attention = attention_scratch(longest, d / plan.heads), widened = w * PANEL;
        size_t floats[] = {m * d, m * 3 * d, m * d, m * w, m * w / 2, m * w / 16,
                           attention > widened ? attention : widened};
        size_t total = 0;
        for (size_t n : floats) total += (n + 15) / 16 * 64;
        if (total > bytes) {
            if (memory) munmap(memory, bytes);
            memory = (char*)pages(total);
            bytes = memory ? total : 0;
        }
        if (!memory) return false;
        char* next = memory;
        auto take = [&](size_t n) {
            char* p = next;
            next += (n + 15) / 16 * 64;
            return p;
        };
        x = (float*)take(floats[0]), qkv = (float*)take(floats[1]), mixed = (float*)take(floats[2]);
        wide = (float*)take(floats[3]);
        small = {take(floats[4]), (float*)take(floats[5])};
        scratch = (float*)take(floats[6]);
        return true;
    }
};

// A thread's way through a chunk, alone or with the others; then the rows are in a workspace that all
// share, and only the scratch is the thread's own.
struct Walk {
    const Plan& plan;
    const Texts& texts;
    const Chunk& chunk;
    const Workspace& rows;
    float* scratch;
    int threads;
    Stretch* stretch;  // null when alone

    template <class Piece>
    void each(int pieces, const Piece& piece) {
        int at_once = pieces / (3 * threads);
        share(stretch ? stretch++ : nullptr, pieces, at_once > 1 ? at_once : 1, piece);
    }

    template <class Piece>
    void each_row(const Piece& piece) {
        each(chunk.rows, piece);
    }

    template <How how>
    void product(const Linear& l, const float* x, float* y) {
        each(l.out / PANEL, [&](int p) { multiply<how>(l, p, x, rows.small, chunk.rows, y, scratch); });
    }

    void whole() {
        const Layer* layer = plan.layer;
        int count = chunk.last - chunk.first, width = plan.width;
        each(count, [&](int i) {
            int text = chunk.first + i, start = texts.starts[text];
            for (int p = 0; p < texts.lengths[text]; p++) {
                embed(start + p - chunk.start, texts.ids[start + p], p);
                narrow(*layer->qkv, rows.x, start + p - chunk.start, rows.small);
            }
        });
        for (int i = 0; i < plan.layers; i++, layer++) {
            product<STORE>(*layer->qkv, rows.x, rows.qkv);
            each(count * plan.heads, [&](int j) {
                attend(chunk.first + j / plan.heads, j % plan.heads, layer->qkv->format);
            });
            if (is_narrow(*layer->mixed)) each_row([&](int r) { narrow(*layer->mixed, rows.mixed, r, rows.small); });
            product<ADD>(*layer->mixed, rows.mixed, rows.x);
            each_row([&](int r) {
                normalize(rows.x + (size_t)r * width, width, layer->attention.weight, layer->attention.bias, plan.eps);
                narrow(*layer->up, rows.x, r, rows.small);
            });
            if (layer->up->format == INT8) product<ROUGH_GELU>(*layer->up, rows.x, rows.wide);
            else product<GELU>(*layer->up, rows.x, rows.wide);
            if (is_narrow(*layer->down)) each_row([&](int r) { narrow(*layer->down, rows.wide, r, rows.small); });
            product<ADD>(*layer->down, rows.wide, rows.x);
            each_row([&](int r) {
                normalize(rows.x + (size_t)r * width, width, layer->output.weight, layer->output.bias, plan.eps);
                if (i + 1 < plan.layers) narrow(*layer[1].qkv, rows.x, r, rows.small);
            });
        }
        each(count, [&](int i) { pool(chunk.first + i); });
    }

    // The most calls of `each` in `whole`: words and pooling, and nine in a layer.
    static int stretches(const Plan& plan) { return 2 + 9 * plan.layers; }

    void embed(int r, int32_t id, int position) {
        int width = plan.width;
        float* x = rows.x + (size_t)r * width;
        size_t at = (size_t)id * width;
        for (int i = 0; i < width; i += 16) {
            f32 word;
            if (plan.words_format == FLOAT16) {
                word = widened((const uint16_t*)plan.words + at + i);
            } else {
                float numbers[16];
                for (int j = 0; j < 16; j++) numbers[j] = number(plan.words, plan.words_format, at + i + j);
                word = load(numbers);
            }
            if (plan.word_scales) word = _mm512_mul_ps(word, set(plan.word_scales[id]));
            store(x + i, _mm512_add_ps(word, load(plan.positions + (size_t)position * width + i)));
        }
        normalize(x, width, plan.embeddings.weight, plan.embeddings.bias, plan.eps);
    }

    void attend(int text, int number, Format format) {
        const int width = plan.width, d = width / plan.heads, first = texts.starts[text] - chunk.start;
        const float* q = rows.qkv + (size_t)first * 3 * width + number * d;
        const float* bias = plan.distances ? plan.distances + (size_t)number * (2 * plan.most - 1) + plan.most - 1 : nullptr;
        Head head{q, q + width, q + 2 * width, 3 * (size_t)width, texts.lengths[text], d, bias,
                  rows.mixed + (size_t)first * width + number * d, (size_t)width};
        if (format == INT8) attend_int16(head, scratch);
        else ::attend(head, scratch);
    }

    void pool(int text) {
        int width = plan.width, skip = texts.skips ? texts.skips[text] : 0, count = texts.lengths[text] - skip;
        const float* x = rows.x + (size_t)(texts.starts[text] - chunk.start + skip) * width;
        float* out = texts.out + (size_t)text * texts.poolings * width;
        for (int p = 0; p < texts.poolings; p++, out += width) {
            int kind = texts.pooling[p];
            if (kind == CLS || kind == LAST) {
                memcpy(out, kind == CLS ? x : x + (size_t)(count - 1) * width, width * sizeof(float));
                continue;
            }
            float by = 1;
            if (kind == MEAN) by = 1 / (float)count;
            if (kind == MEAN_SQRT_LEN) by = 1 / __builtin_sqrtf((float)count);
            // The mean of tokens that weigh their place in the text, counted from 1.
            if (kind == WEIGHTED_MEAN) by = 2 / ((float)count * (2 * skip + count + 1));
            for (int i = 0; i < width; i += 16) {
                f32 sum = kind == MAX ? load(x + i) : _mm512_setzero_ps();
                for (int r = 0; r < count; r++) {
                    f32 y = load(x + (size_t)r * width + i);
                    if (kind == MAX) sum = _mm512_max_ps(sum, y);
                    else if (kind == WEIGHTED_MEAN) sum = _mm512_fmadd_ps(y, set((float)(skip + r + 1)), sum);
                    else sum = _mm512_add_ps(sum, y);
                }
                store(out + i, _mm512_mul_ps(sum, set(by)));
            }
        }
    }
};

inline void* operator new(size_t, void* place) noexcept { return place; }

struct Network {
    Plan plan;
    Team* team;
    Workspace* workspaces;  // one for each thread
};

// Texts in chunks: those of one chunk are in the caches together while they pass all layers.
struct Job {
    Network& net;
    Texts texts;
    Chunk* chunks;
    int count;
    int members;          // threads at work
    bool together;        // all of them on one chunk after the other, or each on its own
    Stretch* stretches;   // together: of every chunk's walk; else one

    static void task(void* of, int number) {
        Job& job = *(Job*)of;
        Network& net = job.net;
        Workspace& own = net.workspaces[number];
        if (!job.together) {
            share(job.stretches, job.count, 1, [&](int i) {
                Walk{net.plan, job.texts, job.chunks[i], own, own.scratch, 1, nullptr}.whole();
            });
            return;
        }
        for (int i = 0; i < job.count; i++)
            Walk{net.plan, job.texts, job.chunks[i], net.workspaces[0], own.scratch, job.members,
                 job.stretches ? job.stretches + i * Walk::stretches(net.plan) : nullptr}.whole();
    }
};

// Rows of a chunk: few enough for the caches (1.4 MB where `wide` is 4096), and so many that reading all
// weights once for them does not show: with 24 in place of 84, a network of width 1024 took 1.8 times as
// long in int8.
constexpr int CHUNK_ROWS = 84;

// Below so many rows for each thread, threads do better to share the weights than the texts.
constexpr int FEW_ROWS = 32;

// Threads that can share a chunk to advantage: of few rows each needs some panels, or taking them costs
// more than multiplying them.
static int sharers(const Plan& plan, int threads, int rows) {
    int panels = plan.width / PANEL, most = rows < 2 * FEW_ROWS ? (panels + 2) / 3 : panels;
    return threads < most ? threads : most;
}

// Texts that follow each other, of about `wanted` rows: a text joins if at least half of it still fits.
static int group(const Texts& texts, int wanted, Chunk* chunks) {
    int n = 0;
    for (int i = 0; i < texts.count; n++) {
        Chunk& chunk = chunks[n] = {i, i, texts.starts[i], 0};
        while (chunk.last < texts.count && (chunk.last == i || chunk.rows + texts.lengths[chunk.last] / 2 <= wanted))
            chunk.rows += texts.lengths[chunk.last++];
        i = chunk.last;
    }
    return n;
}

// Rows of the thread that has most to do when each takes the next chunk once it is free; the largest
// first, which is put in order here.
static int busiest(Chunk* chunks, int n, int threads) {
    qsort(chunks, n, sizeof(Chunk), [](const void* a, const void* b) {
        return ((const Chunk*)b)->rows - ((const Chunk*)a)->rows;
    });
    int done[MOST_THREADS] = {}, most = 0;
    for (int i = 0; i < n; i++) {
        int free = 0;
        for (int t = 1; t < threads; t++)
            if (done[t] < done[free]) free = t;
        done[free] += chunks[i].rows;
        if (done[free] > most) most = done[free];
    }
    return most;
}

static int cut(int threads, const Texts& texts, Chunk* chunks, bool* together) {
    int total = 0;
    for (int i = 0; i < texts.count; i++) texts.starts[i] = total, total += texts.lengths[i];
    int pieces = (total + CHUNK_ROWS - 1) / CHUNK_ROWS;
    *together = threads > 1 && total < FEW_ROWS * threads;
    if (!*together) {
        int even = (pieces + threads - 1) / threads * threads;
        int n = group(texts, (total + even - 1) / even, chunks);
        // Where one thread would have a fifth more to do than its share, as with three equal texts for two
        // threads, better all of them on one chunk after the other.
        *together = threads > 1 && (int64_t)busiest(chunks, n, threads) * threads * 5 > (int64_t)total * 6;
        if (!*together) return n;
    }
    return group(texts, (total + pieces - 1) / pieces, chunks);
}

#define EXPORT __attribute__((visibility("default")))
extern "C" {

// Bytes of the panels of a layer that computes in `format`. `in` and `out` are multiples of 32.
EXPORT size_t arrowhead_panels(int format, int in, int out) {
    return layer_over(nullptr, format, in, out, nullptr).bytes;
}

// Weights [out, in] as they are stored -> `panels`, on a multiple of 64 bytes. Returns 0, or -1 without memory.
EXPORT int arrowhead_lay_out(char* panels, int format, int in, int out, const void* weights, int stored,
                             const float* row_scales) {
    return lay_out(layer_over(panels, format, in, out, nullptr), weights, stored, row_scales) ? 0 : -1;
}

// A layer over panels laid out before, by this process or another; null without memory. `panels` and `bias`
// stay in use.
EXPORT Linear* arrowhead_linear(char* panels, int format, int in, int out, const float* bias) {
    Linear* l = (Linear*)calloc(1, sizeof(Linear));
    if (l) *l = layer_over(panels, format, in, out, bias);
    return l;
}

EXPORT void arrowhead_free_linear(Linear* l) { free(l); }

// A network with threads of its own; null without memory. `plan` and what it points to stay in use.
EXPORT Network* arrowhead_network(const Plan* plan, int threads) {
    Network* net = (Network*)calloc(1, sizeof(Network));
    void* team = aligned_alloc(64, (sizeof(Team) + 63) / 64 * 64);
    Workspace* workspaces = (Workspace*)calloc(threads, sizeof(Workspace));
    if (!net || !team || !workspaces) return free(net), free(team), free(workspaces), nullptr;
    *net = {*plan, new (team) Team(threads), workspaces};
    return net;
}

EXPORT void arrowhead_free_network(Network* net) {
    int threads = net->team->size();
    net->team->~Team();
    for (int i = 0; i < threads; i++)
        if (net->workspaces[i].memory) munmap(net->workspaces[i].memory, net->workspaces[i].bytes);
    free(net->team), free(net->workspaces), free(net);
}

// Texts -> out [count, poolings, width]. Their ids lie end to end, `lengths` [count] tells how many
// are whose: at least one each, and all in the vocabulary, since nothing is checked here. Returns 0, or
// -1 without memory. Not for several threads at once.
EXPORT int arrowhead_embed(Network* net, int count, const int32_t* ids, const int32_t* lengths, const int32_t* skips,
                    int poolings, const int32_t* pooling, float* out) {
    if (count == 0) return 0;
    int threads = net->team->size(), status = -1;
    Chunk* chunks = (Chunk*)malloc(sizeof(Chunk) * count);
    int* starts = (int*)malloc(sizeof(int) * count);
    if (chunks && starts) {
        Job job{*net, {count, ids, lengths, skips, poolings, pooling, out, starts}, chunks, 0, 1, false, nullptr};
        job.count = cut(threads, job.texts, chunks, &job.together);
        int most = 0, longest = 0;
        for (int i = 0; i < job.count; i++) most = chunks[i].rows > most ? chunks[i].rows : most;
        for (int i = 0; i < count; i++) longest = lengths[i] > longest ? lengths[i] : longest;
        job.members = job.together ? sharers(net->plan, threads, most) : threads < job.count ? threads : job.count;
        bool room = true;
        for (int i = 0; i < job.members; i++)
            room = room && net->workspaces[i].reserve(net->plan, job.together && i ? 0 : most, longest);
        size_t bytes = sizeof(Stretch) * (job.together ? job.count * Walk::stretches(net->plan) : 1);
        if (job.members > 1) {
            job.stretches = (Stretch*)aligned_alloc(64, bytes);
            room = room && job.stretches;
            if (room) memset(job.stretches, 0, bytes);
        }
        if (room) {
            net->team->run(Job::task, &job, job.members);
            status = 0;
        }
        free(job.stretches);
    }
    free(chunks), free(starts);
    return status;
}
}
