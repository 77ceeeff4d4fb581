#include "kernels/packed_weights.h"

#include "ggml-backend-impl.h"
#include "vector_loops.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

namespace coreinfer {

std::vector<const PackedKernels *> packed_kernels() {
    std::vector<const PackedKernels *> found;
#if defined(COREINFER_PACKED_AVX512) || defined(COREINFER_PACKED_AVX2)
    __builtin_cpu_init();
#endif
#ifdef COREINFER_PACKED_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vnni")) {
        found.push_back(packed_kernels_avx512());
    }
#endif
#ifdef COREINFER_PACKED_AVX2
    // every processor with AVX2 has F16C, which older compilers cannot ask for
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found.push_back(packed_kernels_avx2());
    }
#endif
    return found;
}

// The fastest, nullptr if there are none. COREINFER_KERNELS names others: avx2, or none.
static const PackedKernels * chosen_kernels() {
    static const PackedKernels * const chosen = []() -> const PackedKernels * {
        const char *      wanted = std::getenv("COREINFER_KERNELS");
        const std::string name   = wanted ? wanted : "";
        for (const PackedKernels * found : packed_kernels()) {
            if (name.empty() || name == found->name) {
                return found;
            }
        }
        return nullptr;
    }();
    return chosen;
}

int32_t level_offset(const PackedKernels & kernels, ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_0:
            return 8;
        case GGML_TYPE_Q5_0:
            return 16;
        case GGML_TYPE_Q8_0:
            return kernels.byte_offset;
        default:
            return 0;
    }
}

//
// packing
//

// The same n bytes of each row of a group, by four beside each other.
static void interleave(const uint8_t * from, size_t row_size, int n, uint8_t * to) {
    for (int j = 0; j < n; j += 4) {
        for (int64_t lane = 0; lane < kLanes; ++lane, to += 4) {
            std::memcpy(to, from + lane * row_size + j, 4);
        }
    }
}

static void interleave_halves(const uint8_t * from, size_t row_size, int n, uint8_t * to) {
    for (int j = 0; j < n; j += 2) {
        for (int64_t lane = 0; lane < kLanes; ++lane, to += 2) {
            std::memcpy(to, from + lane * row_size + j, 2);
        }
    }
}

// Bit i of the stored fifth bits belongs to value i; in a packed lane, bit j of byte k to value 4 j + k.
CLONES static void reorder_fifth_bits(uint32_t * lanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
        uint32_t packed = 0;
        for (int k = 0; k < 4; ++k) {
            uint32_t bits = lanes[lane] >> k & 0x11111111; // every fourth, and now beside each other
            bits          = (bits | bits >> 3) & 0x03030303;
            bits          = (bits | bits >> 6) & 0x000f000f;
            bits          = (bits | bits >> 12) & 0xff;
            packed |= bits << 8 * k;
        }
        lanes[lane] = packed;
    }
}

static void pack_blocks(const PackedKernels & kernels, ggml_type type, const uint8_t * rows, size_t row_size,
                        int64_t n_in, uint8_t * group) {
    const Parts   parts    = parts_of(type);
    const int64_t n_blocks = n_in / 32;
    uint8_t *     scales   = group;
    uint8_t *     levels   = group + n_blocks * parts.n_scales * kLanes;
    for (int64_t b = 0; b < n_blocks; ++b, rows += parts.levels + parts.n_levels) {
        interleave_halves(rows, row_size, parts.n_scales, scales);
        scales += parts.n_scales * kLanes;
        if (parts.fifth > 0) {
            uint32_t bits[kLanes];
            interleave(rows + parts.fifth, row_size, 4, reinterpret_cast<uint8_t *>(bits));
            reorder_fifth_bits(bits);
            std::memcpy(levels, bits, sizeof(bits));
            levels += sizeof(bits);
        }
        interleave(rows + parts.levels, row_size, parts.n_levels, levels);
        if (type == GGML_TYPE_Q8_0) {
            for (int64_t i = 0; i < parts.n_levels * kLanes; ++i) {
                levels[i] = static_cast<uint8_t>(levels[i] + kernels.byte_offset);
            }
        }
        levels += parts.n_levels * kLanes;
    }
}

static void pack_super_blocks(const uint8_t * rows, size_t row_size, int64_t n_in, uint8_t * group) {
    for (int64_t b = 0; b < n_in / 256; ++b, rows += 144, group += kLanes * 144) {
        interleave_halves(rows, row_size, 4, group);
        interleave(rows + 4, row_size, 140, group + 4 * kLanes);
    }
}

void pack_rows(const PackedKernels & kernels, ggml_type type, const uint8_t * rows, int64_t n_rows, int64_t n_in,
               uint8_t * packed) {
    const size_t row_size = ggml_row_size(type, n_in);
    for (int64_t row = 0; row < n_rows; row += kLanes, rows += kLanes * row_size, packed += kLanes * row_size) {
        if (type == GGML_TYPE_Q4_K) {
            pack_super_blocks(rows, row_size, n_in, packed);
        } else {
            pack_blocks(kernels, type, rows, row_size, n_in, packed);
        }
    }
}

//
// the buffer type
//

static const char * get_name(ggml_backend_buffer_type_t) {
    return "CoreInfer packed";
}

static size_t get_alignment(ggml_backend_buffer_type_t) {
    return 64;
}

// Whole rows, from a multiple of kLanes on.
static void set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    const size_t row_size = tensor->nb[1];
    GGML_ASSERT(offset % (kLanes * row_size) == 0 && size % (kLanes * row_size) == 0);
    pack_rows(*chosen_kernels(), tensor->type, static_cast<const uint8_t *>(data),
              static_cast<int64_t>(size / row_size), tensor->ne[0], static_cast<uint8_t *>(tensor->data) + offset);
}

// Memory as the CPU has it; only what is written to it goes another way.
static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer) {
        buffer->buft             = type;
        buffer->iface.set_tensor = set_tensor;
        buffer->iface.get_tensor = nullptr;
        buffer->iface.cpy_tensor = nullptr;
    }
    return buffer;
}

ggml_backend_buffer_type_t packed_buffer_type() {
    static ggml_backend_buffer_type type = {
        { get_name, alloc_buffer, get_alignment, nullptr, nullptr, nullptr },
        ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU),
        nullptr,
    };
    return chosen_kernels() ? &type : nullptr;
}

// The widest input that has kernels: one token of it fits on the stack of any thread.
constexpr int64_t kWidest = 1 << 16;

bool is_packable(ggml_type type, int64_t n_in, int64_t n_out) {
    if (!chosen_kernels() || n_in % ggml_blck_size(type) != 0 || n_in > kWidest || n_out % kLanes != 0) {
        return false;
    }
    switch (type) {
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q4_K:
            return true;
        case GGML_TYPE_Q8_0:
            return chosen_kernels()->takes_bytes;
        default:
            return false;
    }
}

bool is_packed(const ggml_tensor * tensor) {
    return tensor->buffer && ggml_backend_buffer_get_type(tensor->buffer) == packed_buffer_type();
}

//
// the product
//

// How many tokens are quantised at a time: enough to be worth reading the weights, and few enough for the cache.
constexpr int64_t kTokens = 16;

// The memory of quantised activations, as the members of a QuantizedInput need it.
struct Quantized {
    int8_t *  values;
    float *   scales;
    int32_t * starts;
    float *   sums;

    Quantized(int32_t * memory, int64_t n_tokens, int64_t n_in) {
        const int64_t n_blocks = n_tokens * n_in / 32;
        starts                 = memory;
        scales                 = reinterpret_cast<float *>(memory + n_blocks);
        sums                   = scales + n_blocks;
        values                 = reinterpret_cast<int8_t *>(sums + n_blocks);
    }

    // In numbers of 32 bits.
    static constexpr int64_t size(int64_t n_tokens, int64_t n_in) { return n_tokens * (n_in / 32) * (8 + 3); }
};

// The part of a product that one thread computes: n_groups groups of rows from first on.
struct Part {
    const ggml_tensor * weights;
    ggml_tensor *       dst;
    int64_t             first;
    int64_t             n_groups;
};

static void multiply_part(const Part & part, int32_t * memory, int64_t n_at_once) {
    const PackedKernels & kernels  = *chosen_kernels();
    const ggml_tensor *   weights  = part.weights;
    const ggml_tensor *   x        = part.dst->src[0];
    const int64_t         n_in     = weights->ne[0];
    const int64_t         n_blocks = n_in / 32;
    const int64_t         stride   = part.dst->ne[0];
    const int64_t         n_all    = ggml_nrows(x);
    const Quantized       to(memory, n_at_once, n_in);
    for (int64_t token = 0; token < n_all; token += n_at_once) {
        const int64_t n_tokens = std::min(n_at_once, n_all - token);
        for (int64_t t = 0; t < n_tokens; ++t) {
            kernels.quantize(static_cast<const float *>(x->data) + (token + t) * n_in, n_in,
                             level_offset(kernels, weights->type), to.values + t * n_in, to.scales + t * n_blocks,
                             to.starts + t * n_blocks, to.sums + t * n_blocks);
        }
        kernels.multiply(weights->type,
                         static_cast<const uint8_t *>(weights->data) + part.first * kLanes * weights->nb[1],
                         part.n_groups, { to.values, to.scales, to.starts, to.sums, n_in }, n_tokens,
                         static_cast<float *>(part.dst->data) + token * stride + part.first * kLanes, stride);
    }
}

// Token by token, in memory that the thread has in any case. A function of its own, so that others do not touch so much
// of the stack.
NOINLINE static void multiply_part_on_stack(const Part & part) {
    int32_t memory[Quantized::size(1, kWidest)];
    multiply_part(part, memory, 1);
}

// Each thread quantises all activations, which costs less than to wait for others, and multiplies a part of the rows.
// It must not throw: a thread of ggml's would end the process.
static void multiply(ggml_tensor * dst, int ith, int nth, void * data) {
    const auto *  weights  = static_cast<const ggml_tensor *>(data);
    const int64_t n_groups = weights->ne[1] / kLanes;
    const int64_t first    = n_groups * ith / nth;
    const Part    part     = { weights, dst, first, n_groups * (ith + 1) / nth - first };
    if (part.n_groups == 0) {
        return;
    }
    thread_local std::vector<int32_t> memory; // fresh pages would cost more than the product
    const int64_t                     n_at_once = std::min(ggml_nrows(dst->src[0]), kTokens);
    try {
        const auto size = static_cast<size_t>(Quantized::size(n_at_once, weights->ne[0]));
        if (memory.size() < size) {
            memory.resize(size);
        }
    } catch (const std::bad_alloc &) {
        multiply_part_on_stack(part);
        return;
    }
    multiply_part(part, memory.data(), n_at_once);
}

// The weights are no source of the node: no backend claims their buffer type, and the scheduler would abort.
ggml_tensor * packed_multiply(ggml_context * ctx, ggml_tensor * weights, ggml_tensor * x) {
    GGML_ASSERT(x->type == GGML_TYPE_F32 && x->ne[0] == weights->ne[0]);
    if (!ggml_is_contiguous(x)) {
        x = ggml_cont(ctx, x);
    }
    return ggml_custom_4d(ctx, GGML_TYPE_F32, weights->ne[1], x->ne[1], x->ne[2], x->ne[3], &x, 1, multiply,
                          GGML_N_TASKS_MAX, weights);
}

} // namespace coreinfer
