#include "kernels/attention.h"

#include "ggml-cpu-alone.h"
#include "ggml-cpu-layout.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>

namespace coreinfer::attention {

// Of up to so many tokens the positions are shared out among the threads, of more the rows; but of those that are to
// have the bits of single ones the positions too.
constexpr int64_t kFewTokens = 4;

// The most spans that positions are shared out in. Their parts are merged in order, whatever thread had them.
constexpr int64_t kSpans = 16;

// Where the next rows are that no thread has taken, at the beginning of the work.
using Next                 = std::atomic<int64_t>;
constexpr size_t kNextSize = 64;

void clear(float * part, int64_t n_value) {
    std::fill_n(part, part_size(n_value), 0.0f);
    part[0] = -1e30f; // kNone of attention_driver.h
}

void merge(float * part, const float * other, int64_t n_value) {
    const float most   = std::max(part[0], other[0]);
    const float mine   = std::exp(part[0] - most);
    const float theirs = std::exp(other[0] - most);
    part[0]            = most;
    part[1]            = mine * part[1] + theirs * other[1];
    for (int64_t i = kWidth; i < part_size(n_value); ++i) {
        part[i] = mine * part[i] + theirs * other[i];
    }
}

void finish(const float * part, int64_t n_value, float * out) {
    const float factor = part[1] == 0.0f ? 0.0f : 1.0f / part[1];
    for (int64_t i = 0; i < n_value; ++i) {
        out[i] = part[kWidth + i] * factor;
    }
}

namespace {

float parameter(const ggml_tensor * node, int i) {
    float result;
    std::memcpy(&result, node->op_params + i, sizeof(result));
    return result;
}

// The work of a node.
struct Work {
    const ggml_tensor * node;
    const ggml_tensor * q         = node->src[0];
    const ggml_tensor * k         = node->src[1];
    const ggml_tensor * v         = node->src[2];
    const ggml_tensor * mask      = node->src[3];
    int64_t             n_tokens  = q->ne[1];
    int64_t             n_heads   = k->ne[2] * k->ne[3]; // of keys, in all streams
    int64_t             n_shared  = q->ne[2] / k->ne[2];
    int64_t             n_rows    = n_tokens * n_shared; // of a head of keys
    int64_t             n_chunks  = (k->ne[1] + kChunk - 1) / kChunk;
    int64_t             n_spans   = std::min(n_chunks, kSpans);
    int64_t             n_blocks  = (n_rows + kRows - 1) / kRows;
    int64_t             part      = part_size(v->ne[0]);
    int64_t             n_scratch = scratch_size(k->ne[0], v->ne[0]);

    explicit Work(const ggml_tensor * of) : node(of) {}

    bool is_short() const { return n_tokens <= kFewTokens || ggml_cpu_is_alone(node); }

    // How many rows from this one on go through a chunk together.
    int64_t rows_at_once(int64_t row, int64_t n_alike) const {
        if (!ggml_cpu_is_alone(node)) {
            return std::min(kRows, n_rows - row);
        }
        // no more than go the way that those of a single token go
        return n_alike < kManyRows ? std::min((kManyRows - 1) / n_alike * n_alike, n_rows - row)
                                   : std::min(kRows, n_alike - row % n_alike);
    }

    int64_t first_chunk(int64_t span) const { return n_chunks * span / n_spans; }

    Head head(int64_t i) const {
        const int64_t head   = i % k->ne[2];
        const int64_t stream = i / k->ne[2];
        const auto    at     = [&](const ggml_tensor * x, int64_t i2) {
            return static_cast<const uint8_t *>(x->data) + i2 * x->nb[2] + stream * x->nb[3];
        };
        return { at(k, head),
                 k->nb[1],
                 at(v, head),
                 v->nb[1],
                 at(q, head * n_shared),
                 q->nb[1],
                 q->nb[2],
                 mask ? static_cast<const uint8_t *>(mask->data) + stream % mask->ne[3] * mask->nb[3] : nullptr,
                 mask ? mask->nb[1] : 0,
                 n_shared,
                 k->ne[1],
                 k->ne[0],
                 v->ne[0],
                 parameter(node, 0) };
    }

    // Of a row of a head.
    float * out(int64_t head, int64_t row) const {
        const int64_t stream = head / k->ne[2];
        const int64_t of_q   = head % k->ne[2] * n_shared + row % n_shared;
        const int64_t token  = stream * n_tokens + row / n_shared;
        return static_cast<float *>(node->data) + (token * q->ne[2] + of_q) * v->ne[0];
    }
};

} // namespace

bool is_supported(const ggml_tensor * node) {
    const ggml_tensor * q               = node->src[0];
    const ggml_tensor * k               = node->src[1];
    const ggml_tensor * v               = node->src[2];
    const ggml_tensor * mask            = node->src[3];
    const bool          has_bias_or_cap = parameter(node, 1) != 0.0f || parameter(node, 2) != 0.0f;
    return !has_bias_or_cap && !node->src[4] && q->type == GGML_TYPE_F32 && k->type == GGML_TYPE_F16 &&
           v->type == GGML_TYPE_F16 && q->nb[0] == 4 && k->nb[0] == 2 && v->nb[0] == 2 && k->ne[0] % kWidth == 0 &&
           v->ne[0] % kWidth == 0 && k->ne[2] == v->ne[2] && q->ne[2] % k->ne[2] == 0 && q->ne[3] == k->ne[3] &&
           q->ne[3] == v->ne[3] && ggml_is_contiguous(node) &&
           (!mask || (mask->type == GGML_TYPE_F16 && mask->nb[0] == 2 && mask->ne[2] == 1));
}

size_t work_size(int n_threads, const ggml_tensor * node) {
    const Work    work(node);
    const int64_t n_parts = work.is_short() ? work.n_heads * work.n_rows * work.n_spans : n_threads * kRows;
    return 2 * kNextSize + sizeof(float) * (n_threads * work.n_scratch + n_parts * work.part);
}

void compute(Attend attend, const ggml_cpu_layout_thread & thread, void (*wait)(const ggml_cpu_layout_thread *),
             ggml_tensor * node) {
    const Work work(node);
    auto       start   = (reinterpret_cast<uintptr_t>(thread.work) + kNextSize - 1) / kNextSize * kNextSize;
    auto &     next    = *reinterpret_cast<Next *>(start);
    auto *     memory  = reinterpret_cast<float *>(start + kNextSize);
    auto *     parts   = memory + thread.nth * work.n_scratch;
    auto *     scratch = memory + thread.ith * work.n_scratch;
    if (work.is_short()) {
        const int64_t n_units = work.n_heads * work.n_spans;
        for (int64_t i = n_units * thread.ith / thread.nth; i < n_units * (thread.ith + 1) / thread.nth; ++i) {
            // the heads of a position lie beside each other
            const Head    head = work.head(i % work.n_heads);
            const int64_t span = i / work.n_heads;
            float * const of   = parts + i * work.n_rows * work.part;
            for (int64_t row = 0; row < work.n_rows; ++row) {
                clear(of + row * work.part, head.n_value);
            }
            for (int64_t chunk = work.first_chunk(span); chunk < work.first_chunk(span + 1); ++chunk) {
                for (int64_t row = 0, n; row < work.n_rows; row += n) {
                    n = work.rows_at_once(row, head.n_shared);
                    attend(head, chunk, row, n, scratch, of + row * work.part);
                }
            }
        }
        wait(&thread);
        const int64_t n_all = work.n_heads * work.n_rows;
        for (int64_t i = n_all * thread.ith / thread.nth; i < n_all * (thread.ith + 1) / thread.nth; ++i) {
            const int64_t head = i / work.n_rows;
            const int64_t row  = i % work.n_rows;
            const auto    of   = [&](int64_t span) {
                return parts + ((span * work.n_heads + head) * work.n_rows + row) * work.part;
            };
            for (int64_t span = 1; span < work.n_spans; ++span) {
                merge(of(0), of(span), work.v->ne[0]);
            }
            finish(of(0), work.v->ne[0], work.out(head, row));
        }
        return;
    }
    if (thread.ith == 0) {
        new (&next) Next(0);
    }
    wait(&thread);
    parts += thread.ith * kRows * work.part;
    for (int64_t i; (i = next.fetch_add(1)) < work.n_heads * work.n_blocks;) {
        // the last rows first, which have the most positions
        const int64_t block = work.n_blocks - 1 - i / work.n_heads;
        const int64_t first = block * kRows;
        const int64_t n     = std::min(kRows, work.n_rows - first);
        const Head    head  = work.head(i % work.n_heads);
        for (int64_t row = 0; row < n; ++row) {
            clear(parts + row * work.part, head.n_value);
        }
        for (int64_t chunk = 0; chunk < work.n_chunks; ++chunk) {
            attend(head, chunk, first, n, scratch, parts);
        }
        for (int64_t row = 0; row < n; ++row) {
            finish(parts + row * work.part, head.n_value, work.out(i % work.n_heads, first + row));
        }
    }
}

} // namespace coreinfer::attention
