#include "kernels/packed_layout.h"

#include "vector_loops.h"

#include <cstdlib>
#include <cstring>
#include <string>

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

const PackedKernels * chosen_kernels() {
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

bool has_layout(const PackedKernels & kernels, ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q4_K:
            return true;
        case GGML_TYPE_Q8_0:
            return kernels.takes_bytes;
        default:
            return false;
    }
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

} // namespace coreinfer
