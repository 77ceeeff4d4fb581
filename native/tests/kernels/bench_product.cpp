// How fast the packed products are on one thread, beside ggml's own for the same weights. Not a test.
//
//     bench_product [type [kernels [n_in n_out]]]
//
// prints for each number of tokens thousands of millions of multiplications a second, and for one token, with weights
// that are larger than the caches, GB of weights a second. If BENCH_PREPARE is set, also how fast activations are
// quantised and weights packed.
//
// Under qemu with count_instructions.c, which COUNT_INSTRUCTIONS names a file for, it prints instructions for each
// multiplication instead.

#include "kernels/low_bits.h"
#include "kernels/packed_weights.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <random>
#include <string>
#include <vector>

#ifdef __linux__
#    include <fcntl.h>
#    include <sys/mman.h>
#    include <unistd.h>
#endif

using namespace coreinfer;

static const std::vector<ggml_type> kTypes = { GGML_TYPE_Q4_0, GGML_TYPE_Q4_1,   GGML_TYPE_Q5_0, GGML_TYPE_Q5_1,
                                               GGML_TYPE_Q8_0, GGML_TYPE_IQ4_NL, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K,
                                               GGML_TYPE_Q6_K, GGML_TYPE_IQ4_XS, kLow4,          kLow3,
                                               kLow2,          GGML_TYPE_Q3_K,   GGML_TYPE_Q2_K };

// What this process has executed, if that is counted.
static const volatile uint64_t * count_of_instructions() {
#ifdef __linux__
    const char * name  = std::getenv("COUNT_INSTRUCTIONS");
    const int    file  = name ? open(name, O_RDONLY) : -1;
    void * const count = mmap(nullptr, sizeof(uint64_t), PROT_READ, MAP_SHARED, file, 0);
    return file < 0 || count == MAP_FAILED ? nullptr : static_cast<const uint64_t *>(count);
#else
    return nullptr;
#endif
}

static const volatile uint64_t * const kInstructions = count_of_instructions();

static const std::vector<int64_t> kTokens =
    kInstructions ? std::vector<int64_t>{ 1, 2, 4, 8, 64 } : std::vector<int64_t>{ 1, 2, 4, 8, 64, 512 };

// More than any cache has.
static const size_t kMuch = kInstructions ? 0 : size_t{ 192 } << 20;

static bool is_ours_alone(ggml_type type) {
    return type == kLow4 || type == kLow3 || type == kLow2;
}

static const char * name_of(ggml_type type) {
    return type == kLow4 ? "4 bits" : type == kLow3 ? "3 bits" : type == kLow2 ? "2 bits" : ggml_type_name(type);
}

static size_t size_of_row(ggml_type type, int64_t n_in) {
    return is_ours_alone(type) ? LowParts(type, n_in).size : ggml_row_size(type, n_in);
}

// The least seconds of processor time of a call, which gets how often it was called before: the least mean of n_round
// calls, and more if those are too few to be timed. Where instructions are counted, those of a call.
static double seconds(size_t n_round, const std::function<void(size_t)> & call) {
    if (kInstructions) {
        call(0); // which may prepare something
        const uint64_t before = *kInstructions;
        call(1);
        return static_cast<double>(*kInstructions - before);
    }
    double least   = 1e9;
    double all     = 0.0;
    size_t n_calls = 0;
    while (n_calls < 3 * n_round || all < 0.25) {
        const std::clock_t start = std::clock();
        for (size_t i = 0; i < n_round; ++i) {
            call(n_calls++);
        }
        const double took = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
        least             = std::min(least, took / static_cast<double>(n_round));
        all += took;
    }
    return least;
}

// All copies of the weights are read in a round if memory may be the limit.
static size_t round_of(int64_t n_tokens, size_t n_copies) {
    return n_tokens <= 8 ? n_copies : 1;
}

static void print(const char * what, ggml_type type, int64_t n_in, int64_t n_out,
                  const std::function<double(int64_t n_tokens)> & measured) {
    std::printf("%-7s %-10s %5d x %5d ", name_of(type), what, static_cast<int>(n_in), static_cast<int>(n_out));
    for (int64_t n_tokens : kTokens) {
        const double took = measured(n_tokens);
        if (kInstructions) {
            std::printf(" %7.3f", took / static_cast<double>(n_in * n_out * n_tokens));
            continue;
        }
        std::printf(" %7.1f", 1e-9 * static_cast<double>(n_in * n_out * n_tokens) / took);
        if (n_tokens == 1) {
            std::printf(" (%5.1f GB/s)", 1e-9 * static_cast<double>(size_of_row(type, n_in) * n_out) / took);
        }
    }
    std::printf("\n");
    std::fflush(stdout);
}

static std::vector<uint8_t> random_rows(ggml_type type, int64_t n_in, int64_t n_out) {
    std::mt19937                    bits(1);
    std::normal_distribution<float> normal;
    std::vector<float>              row(n_in);
    const size_t                    size = size_of_row(type, n_in);
    std::vector<uint8_t>            rows(size * n_out);
    const int64_t                   n_different = std::min<int64_t>(n_out, 64);
    for (int64_t i = 0; i < n_different; ++i) {
        for (float & x : row) {
            x = normal(bits);
        }
        if (is_ours_alone(type)) {
            quantize_low_row(type, row.data(), n_in, rows.data() + i * size);
        } else {
            ggml_quantize_chunk(type, row.data(), rows.data() + i * size, 0, 1, n_in, nullptr);
        }
    }
    for (int64_t i = n_different; i < n_out; ++i) {
        std::memcpy(rows.data() + i * size, rows.data() + i % n_different * size, size);
    }
    return rows;
}

static void bench_packed(const PackedKernels & kernels, ggml_type type, int64_t n_in, int64_t n_out,
                         const std::vector<uint8_t> & rows, const std::vector<float> & x) {
    // aligned as buffers of ggml are
    const size_t            n_copies = kMuch / rows.size() + 1;
    ggml_backend_buffer_ptr buffer(
        ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), n_copies * rows.size()));
    auto * const packed = static_cast<uint8_t *>(ggml_backend_buffer_get_base(buffer.get()));
    pack_rows(kernels, type, rows.data(), n_out, n_in, packed);
    for (size_t i = 1; i < n_copies; ++i) {
        std::memcpy(packed + i * rows.size(), packed, rows.size());
    }
    std::vector<int64_t> memory(QuantizedTokens::size(kTokens.back(), n_in) / sizeof(int64_t));
    std::vector<float>   out(n_out * kTokens.back());
    const auto           quantized = [&](int64_t n_tokens) {
        const QuantizedTokens tokens(memory.data(), n_tokens, n_in);
        for (int64_t token = 0; token < n_tokens; ++token) {
            tokens.quantize(kernels, type, token, x.data() + token * n_in);
        }
        return tokens.input();
    };
    if (std::getenv("BENCH_PREPARE")) {
        const auto   pack   = [&](size_t) { pack_rows(kernels, type, rows.data(), n_out, n_in, packed); };
        const auto   fill   = [&](size_t) { quantized(kTokens.back()); };
        const double values = 1e-9 * static_cast<double>(x.size()) / seconds(1, fill);
        const double bytes  = 1e-9 * static_cast<double>(rows.size()) / seconds(1, pack);
        std::printf("%s: %.2f G activations/s quantised, %.2f GB/s of weights packed\n", name_of(type), values, bytes);
    }
    print(kernels.name, type, n_in, n_out, [&](int64_t n_tokens) {
        const QuantizedInput in = quantized(n_tokens);
        return seconds(round_of(n_tokens, n_copies), [&](size_t i) {
            kernels.multiply(type, packed + i % n_copies * rows.size(), n_out / kLanes, in, n_tokens, out.data(), n_out,
                             false);
        });
    });
}

// In ggml's repacked layout, if it has one for the type.
static void bench_ggml(ggml_type type, int64_t n_in, int64_t n_out, const std::vector<uint8_t> & rows,
                       const std::vector<float> & x) {
    static const ggml_backend_ptr backend(ggml_backend_cpu_init());
    ggml_backend_cpu_set_n_threads(backend.get(), 1);

    std::vector<ggml_backend_buffer_type_t> buffer_types = cpu_layouts();
    buffer_types.insert(buffer_types.begin(), ggml_backend_cpu_buffer_type());
    for (ggml_backend_buffer_type_t buffer_type : buffer_types) {
        const size_t               n_copies = kMuch / rows.size() + 1;
        ggml_context_ptr           meta(ggml_init({ (n_copies + 2) * ggml_tensor_overhead(), nullptr, true }));
        std::vector<ggml_tensor *> copies;
        for (size_t i = 0; i < n_copies; ++i) {
            copies.push_back(ggml_new_tensor_2d(meta.get(), type, n_in, n_out));
        }
        ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(meta.get(), buffer_type));
        if (buffer_type != buffer_types[0] && !copies[0]->extra) {
            continue; // the buffer type has no layout for it
        }
        for (ggml_tensor * weights : copies) {
            ggml_backend_tensor_set(weights, rows.data(), 0, rows.size());
        }
        print(ggml_backend_buft_name(buffer_type), type, n_in, n_out, [&](int64_t n_tokens) {
            ggml_context_ptr nodes(ggml_init({ n_copies * (2 * ggml_tensor_overhead() + 8192), nullptr, true }));
            ggml_tensor *    input = ggml_new_tensor_2d(nodes.get(), GGML_TYPE_F32, n_in, n_tokens);
            ggml_tensor *    out   = ggml_new_tensor_2d(nodes.get(), GGML_TYPE_F32, n_out, n_tokens);

            ggml_backend_buffer_ptr memory(
                ggml_backend_alloc_ctx_tensors_from_buft(nodes.get(), ggml_backend_cpu_buffer_type()));
            ggml_backend_tensor_set(input, x.data(), 0, ggml_nbytes(input));
            std::vector<ggml_cgraph *> graphs;
            for (ggml_tensor * weights : copies) {
                ggml_tensor * product = ggml_mul_mat(nodes.get(), weights, input);
                product->data         = out->data;
                product->buffer       = out->buffer;
                graphs.push_back(ggml_new_graph_custom(nodes.get(), 4, false));
                ggml_build_forward_expand(graphs.back(), product);
            }
            return seconds(round_of(n_tokens, n_copies),
                           [&](size_t i) { ggml_backend_graph_compute(backend.get(), graphs[i % n_copies]); });
        });
    }
}

int main(int argc, char ** argv) {
    const std::string type_name = argc > 1 ? argv[1] : "all";
    const std::string name      = argc > 2 ? argv[2] : "all";

    std::vector<std::pair<int64_t, int64_t>> shapes = {
        { 2048, 5632 }, { 5632, 2048 }, { 576, 1536 }, { 4096, 14336 }, { 14336, 4096 }
    };
    if (argc > 4) {
        shapes = { { std::atoll(argv[3]), std::atoll(argv[4]) } };
    }
    std::printf("%-7s %-10s %13s ", "type", "kernels", "in x out");
    for (int64_t n_tokens : kTokens) {
        std::printf(n_tokens == 1 && !kInstructions ? " %7d %12s" : " %7d", static_cast<int>(n_tokens), "");
    }
    std::printf("\n");
    for (ggml_type type : kTypes) {
        if (type_name != "all" && type_name != name_of(type)) {
            continue;
        }
        for (const auto & [n_in, n_out] : shapes) {
            if (!is_ours_alone(type) && n_in % ggml_blck_size(type) != 0) {
                continue;
            }
            const std::vector<uint8_t> rows = random_rows(type, n_in, n_out);
            std::vector<float>         x(n_in * kTokens.back());
            std::mt19937               bits(2);
            for (float & value : x) {
                value = std::normal_distribution<float>()(bits);
            }
            for (const PackedKernels * kernels : packed_kernels()) {
                if ((has_layout(type) || is_ours_alone(type)) && (name == "all" || name == kernels->name)) {
                    bench_packed(*kernels, type, n_in, n_out, rows, x);
                }
            }
            if (!is_ours_alone(type) && (name == "all" || name == "ggml")) {
                bench_ggml(type, n_in, n_out, rows, x);
            }
        }
    }
    return 0;
}
