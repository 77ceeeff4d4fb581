#include "gather.h"

#include "error.h"
#include "kernels/packed_weights.h"
#include "quant.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <tuple>

namespace coreinfer {

// How much of a file is read at a time: several rows, and little enough to stay in the cache.
constexpr size_t kChunk = 256 * 1024;

static uint64_t bytes_of(std::initializer_list<const ggml_tensor *> tensors) {
    uint64_t sum = 0;
    for (const ggml_tensor * tensor : tensors) {
        sum += tensor ? ggml_nbytes(tensor) : 0;
    }
    return sum;
}

uint64_t Ffn::n_bytes() const {
    return bytes_of({ up, up_b, gate, gate_b, down, down_b });
}

uint64_t Core::n_bytes() const {
    return bytes_of({ up, up_b, gate, gate_b, down, down_b });
}

bool Core::fits(const Core & other) const {
    return other.up && !neurons.empty() && whole == other.whole && fill.empty() == other.fill.empty() &&
           GGML_PAD(neurons.size(), kBlock) == GGML_PAD(other.neurons.size(), kBlock);
}

// Memory of one thread, used again for each task: fresh pages cost more than what is done with them.
struct Scratch {
    std::vector<uint8_t> chunk;   // bytes of the file
    std::vector<float>   weights; // a row of them
    std::vector<uint8_t> staging; // a compact tensor on its way into its buffer

    // Room to fetch so many bytes into.
    uint8_t * room(size_t n) { return File::room(chunk, n); }

    template <typename T>
    static T * at_least(std::vector<T> & memory, size_t n) {
        if (memory.size() < n) {
            memory.resize(n);
        }
        return memory.data();
    }
};

// Run task(i, scratch) for i = 0 .. n - 1 on n_threads threads; the first exception ends the rest and is
// thrown.
static void run_parallel(size_t n, int n_threads, const std::function<void(size_t, Scratch &)> & task) {
    std::atomic<size_t> next(0);
    std::exception_ptr  failure;
    std::mutex          mutex;

    const auto work = [&] {
        Scratch scratch;
        for (size_t i; (i = next++) < n;) {
            try {
                task(i, scratch);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(mutex);
                if (!failure) {
                    failure = std::current_exception();
                }
                next = n;
            }
        }
    };
    std::vector<std::thread> threads;
    threads.reserve(n);
    for (size_t i = 1; i < std::min<size_t>(std::max(n_threads, 1), n); ++i) {
        try {
            threads.emplace_back(work);
        } catch (const std::exception &) {
            break; // as many as the system gives
        }
    }
    work();
    for (std::thread & thread : threads) {
        thread.join();
    }
    if (failure) {
        std::rethrow_exception(failure);
    }
}

//
// placing
//

bool is_on_cpu(ggml_backend_buffer_type_t type) {
    ggml_backend_dev_t device = ggml_backend_buft_get_device(type);
    return !device || ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU || ggml_backend_buft_is_host(type);
}

bool may_pack(const std::vector<Ffn> & ffns) {
    return std::all_of(ffns.begin(), ffns.end(),
                       [](const Ffn & ffn) { return is_on_cpu(ggml_backend_buffer_get_type(ffn.down->buffer)); });
}

// The buffer types to try for weights that take the place of this one, the fastest first.
static std::vector<ggml_backend_buffer_type_t> candidate_buffer_types(const ggml_tensor * dense) {
    ggml_backend_buffer_type_t type   = ggml_backend_buffer_get_type(dense->buffer);
    ggml_backend_dev_t         device = ggml_backend_buft_get_device(type);
    if (!is_on_cpu(type)) {
        return { ggml_backend_dev_buffer_type(device) };
    }
    device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);

    std::vector<ggml_backend_buffer_type_t> result;
    const auto                              extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
    for (auto * at = extra ? extra(device) : nullptr; at && *at; ++at) {
        result.push_back(*at);
    }
    result.push_back(ggml_backend_dev_buffer_type(device));
    return result;
}

// Whether a matrix product with weights of this shape runs where such a buffer is.
static bool supports_product(ggml_backend_buffer_type_t buffer_type, ggml_type type, int64_t n_in, int64_t n_out) {
    ggml_context_ptr        ctx(ggml_init({ ggml_tensor_overhead() * 4, nullptr, /*.no_alloc =*/true }));
    ggml_backend_buffer_ptr buffer(ggml_backend_buft_alloc_buffer(buffer_type, 0));
    ggml_backend_dev_t      device = ggml_backend_buft_get_device(buffer_type);
    if (!ctx || !buffer || !device) {
        return false;
    }
    ggml_tensor * weights = ggml_new_tensor_2d(ctx.get(), type, n_in, n_out);
    weights->buffer       = buffer.get();
    ggml_tensor * product = ggml_mul_mat(ctx.get(), weights, ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_in, 512));
    return ggml_backend_dev_supports_op(device, product);
}

static ggml_backend_buffer_type_t first_that_supports(const std::vector<ggml_backend_buffer_type_t> & candidates,
                                                      ggml_type type, int64_t n_in, int64_t n_out) {
    const auto last = std::prev(candidates.end());
    return *std::find_if(candidates.begin(), last, [&](ggml_backend_buffer_type_t candidate) {
        return supports_product(candidate, type, n_in, n_out);
    });
}

ggml_backend_buffer_type_t buffer_type_for(const ggml_tensor * dense, ggml_type type, int64_t n_in, int64_t n_out) {
    return first_that_supports(candidate_buffer_types(dense), type, n_in, n_out);
}

ggml_tensor rows_of(const ggml_tensor * tensor, int64_t first, int64_t n) {
    ggml_tensor rows = *tensor;
    rows.ne[1]       = n;
    rows.nb[2] = rows.nb[3] = n * rows.nb[1];
    // a row may take more than in the file: ggml's layouts for AMX have sums beside the weights
    const size_t row_size = ggml_backend_buffer_get_alloc_size(tensor->buffer, tensor) / tensor->ne[1];
    rows.data             = static_cast<uint8_t *>(tensor->data) + first * row_size;
    return rows;
}

static bool try_rows(ggml_backend_buffer_type_t type, ggml_type weights, int64_t n_in) {
    ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true }));
    if (!ctx) {
        return false;
    }
    ggml_tensor * tensor = ggml_new_tensor_2d(ctx.get(), weights, n_in, 2 * kRowGroup);
    const size_t  size   = ggml_backend_buft_get_alloc_size(type, tensor);
    if (size < ggml_nbytes(tensor) || size % tensor->ne[1] != 0) {
        return false;
    }
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), type));
    if (!buffer) {
        return false;
    }
    std::vector<uint8_t> data(ggml_nbytes(tensor));
    for (size_t i = 0; i < data.size(); ++i) {
        data[i] = static_cast<uint8_t>(i * 2654435761u >> 13);
    }
    const auto * laid_out = static_cast<const uint8_t *>(tensor->data);
    std::memset(tensor->data, 0, size);
    ggml_backend_tensor_set(tensor, data.data(), 0, data.size());
    const std::vector<uint8_t> whole(laid_out, laid_out + size);
    std::memset(tensor->data, 0, size);
    for (int64_t first = 0; first < 2 * kRowGroup; first += kRowGroup) {
        ggml_tensor rows = rows_of(tensor, first, kRowGroup);
        ggml_backend_tensor_set(&rows, data.data() + first * tensor->nb[1], 0, data.size() / 2);
    }
    return std::equal(whole.begin(), whole.end(), laid_out);
}

bool takes_rows(ggml_backend_buffer_type_t type, ggml_type weights, int64_t n_in) {
    ggml_backend_dev_t device = ggml_backend_buft_get_device(type);
    if (ggml_backend_buft_is_host(type)) {
        return true;
    }
    if (device && ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_CPU) {
        return false; // what lies there cannot be looked at
    }
    static std::mutex                                                                 mutex;
    static std::map<std::tuple<ggml_backend_buffer_type_t, ggml_type, int64_t>, bool> known;
    const std::lock_guard<std::mutex>                                                 lock(mutex);
    const auto [it, is_new] = known.emplace(std::make_tuple(type, weights, n_in), false);
    if (is_new) {
        it->second = try_rows(type, weights, n_in);
    }
    return it->second;
}

// Makes the tensors of a core, a context and a buffer for each buffer type.
class Placement {
  public:
    Placement(const Ffn & ffn, bool packs) : candidates_(candidate_buffer_types(ffn.down)), packs_(packs) {}

    ggml_tensor * matrix(ggml_type type, int64_t n_in, int64_t n_out, const char * name) {
        const bool                 packed = packs_ && is_packable(type, n_in, n_out);
        ggml_backend_buffer_type_t where =
            packed ? packed_buffer_type() : first_that_supports(candidates_, type, n_in, n_out);
        return named(ggml_new_tensor_2d(context(where), type, n_in, n_out), name);
    }

    ggml_tensor * vector(int64_t n, const char * name) {
        return named(ggml_new_tensor_1d(context(candidates_.back()), GGML_TYPE_F32, n), name);
    }

    void allocate(Core & core) {
        for (auto & [type, ctx] : contexts_) {
            ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), type);
            if (!buffer) {
                throw Error(COREINFER_NO_MEMORY,
                            std::string("no memory for the core set in ") + ggml_backend_buft_name(type) + " buffers");
            }
            ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
            core.buffers.emplace_back(buffer);
            core.contexts.push_back(std::move(ctx));
        }
    }

  private:
    ggml_context * context(ggml_backend_buffer_type_t type) {
        ggml_context_ptr & ctx = contexts_[type];
        if (!ctx) {
            ctx.reset(ggml_init({ ggml_tensor_overhead() * 8, nullptr, /*.no_alloc =*/true }));
            if (!ctx) {
                throw Error(COREINFER_NO_MEMORY, "no memory for the tensors of the core set");
            }
        }
        return ctx.get();
    }

    static ggml_tensor * named(ggml_tensor * tensor, const char * name) {
        ggml_set_name(tensor, name);
        return tensor;
    }

    std::vector<ggml_backend_buffer_type_t>                candidates_;
    bool                                                   packs_;
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> contexts_;
};

static void make_tensors(const Ffn & ffn, Core & core, bool packs) {
    const int64_t n_pad = core.whole ? ffn.n_ff() : GGML_PAD(static_cast<int64_t>(core.neurons.size()), kBlock);
    const int64_t n_up  = ffn.fused ? 2 * n_pad : n_pad;

    // a whole core equals the dense FFN to the last bit, and our kernels round activations differently
    Placement placement(ffn, packs && !core.whole);
    core.up     = placement.matrix(ffn.up->type, ffn.n_in(), n_up, "core_ffn_up");
    core.up_b   = ffn.up_b ? placement.vector(n_up, "core_ffn_up_b") : nullptr;
    core.gate   = ffn.gate ? placement.matrix(ffn.gate->type, ffn.n_in(), n_pad, "core_ffn_gate") : nullptr;
    core.gate_b = ffn.gate_b ? placement.vector(n_pad, "core_ffn_gate_b") : nullptr;
    core.down   = placement.matrix(core.whole ? ffn.down->type : column_type(ffn.down->type), n_pad, ffn.n_out(),
                                   "core_ffn_down");
    core.down_b = ffn.down_b || !core.fill.empty() ? placement.vector(ffn.n_out(), "core_ffn_down_b") : nullptr;
    placement.allocate(core);
}

//
// gathering
//

// Where the bytes of a tensor are written, row after row: in place, or, if its layout is its buffer's own
// affair, to be handed over, a group of rows at a time where the layout allows it.
class Output {
  public:
    Output(ggml_tensor * tensor, Scratch & scratch) :
        tensor_(tensor),
        staged_(!ggml_backend_buffer_is_host(tensor->buffer)),
        n_group_(tensor->ne[1]),
        data_(static_cast<uint8_t *>(tensor->data)) {
        if (staged_) {
            if (takes_rows(ggml_backend_buffer_get_type(tensor->buffer), tensor->type, tensor->ne[0])) {
                n_group_ = std::min(kRowGroup, n_group_);
            }
            data_ = Scratch::at_least(scratch.staging, n_group_ * tensor->nb[1]);
        }
    }

    // Rows are asked for in order, each is written before the next is asked for.
    uint8_t * row(int64_t i) {
        if (i >= first_ + n_group_) {
            hand_over();
            first_ = i / n_group_ * n_group_;
        }
        return data_ + (i - first_) * tensor_->nb[1];
    }

    void finish() { hand_over(); }

  private:
    void hand_over() {
        if (staged_) {
            ggml_tensor rows = rows_of(tensor_, first_, std::min(n_group_, tensor_->ne[1] - first_));
            ggml_backend_tensor_set(&rows, data_, 0, rows.nb[2]);
        }
    }

    ggml_tensor * tensor_;
    bool          staged_;
    int64_t       n_group_; // rows that are handed over at once
    int64_t       first_ = 0;
    uint8_t *     data_;
};

// Copy the rows first + neurons[i] of the file's tensor to the rows start + i of the output.
static void copy_rows(const FileTensor & file, size_t row_size, int64_t first, const std::vector<int32_t> & neurons,
                      Output & output, int64_t start, Scratch & scratch) {
    const size_t    rows_a_chunk = std::max<size_t>(1, kChunk / row_size);
    uint8_t * const chunk        = scratch.room(rows_a_chunk * row_size);
    for (size_t i = 0; i < neurons.size();) {
        // read up to the last wanted row that fits, unwanted ones between included: that beats many reads
        size_t end = i + 1;
        while (end < neurons.size() && static_cast<size_t>(neurons[end] - neurons[i]) < rows_a_chunk) {
            ++end;
        }
        const size_t    n_rows = neurons[end - 1] - neurons[i] + 1;
        const uint8_t * rows =
            file.file->fetch(chunk, n_rows * row_size, file.offset + (first + neurons[i]) * row_size);
        for (const int32_t base = neurons[i]; i < end; ++i) {
            std::memcpy(output.row(start + i), rows + (neurons[i] - base) * row_size, row_size);
        }
    }
}

static void gather_rows(const Ffn & ffn, const Core & core, const FileTensor & file, ggml_tensor * compact, bool fused,
                        Scratch & scratch) {
    const int64_t n_core   = static_cast<int64_t>(core.neurons.size());
    const int64_t n_parts  = fused ? 2 : 1;
    const int64_t n_pad    = compact->ne[1] / n_parts;
    const size_t  row_size = compact->nb[1];

    Output output(compact, scratch);
    for (int64_t part = 0; part < n_parts; ++part) {
        copy_rows(file, row_size, part * ffn.n_ff(), core.neurons, output, part * n_pad, scratch);
        // all-zero blocks are zero weights in every type
        for (int64_t i = n_core; i < n_pad; ++i) {
            std::memset(output.row(part * n_pad + i), 0, row_size);
        }
    }
    output.finish();
}

// Call visit(row, weights) for each row of down, dequantised to [n_ff].
static void for_each_down_row(const Ffn & ffn, Scratch & scratch,
                              const std::function<void(int64_t, const float *)> & visit) {
    const int64_t   n_ff         = ffn.n_ff();
    const size_t    row_size     = ffn.down->nb[1];
    const int64_t   rows_a_chunk = std::max<int64_t>(1, kChunk / row_size);
    uint8_t * const chunk        = scratch.room(rows_a_chunk * row_size);
    float * const   weights      = Scratch::at_least(scratch.weights, n_ff);
    for (int64_t first = 0; first < ffn.n_out(); first += rows_a_chunk) {
        const int64_t   n_rows = std::min(rows_a_chunk, ffn.n_out() - first);
        const uint8_t * rows =
            ffn.down_file.file->fetch(chunk, n_rows * row_size, ffn.down_file.offset + first * row_size);
        for (int64_t i = 0; i < n_rows; ++i) {
            dequantize_row(ffn.down->type, rows + i * row_size, weights, n_ff);
            visit(first + i, weights);
        }
    }
}

// A bias of the model [n], which is F32 on any backend; zeros if there is none.
static std::vector<float> read_bias(const ggml_tensor * bias, int64_t n) {
    std::vector<float> values(n, 0.0f);
    if (bias) {
        ggml_backend_tensor_get(bias, values.data(), 0, n * sizeof(float));
    }
    return values;
}

static void set_vector(ggml_tensor * tensor, const std::vector<float> & values) {
    ggml_backend_tensor_set(tensor, values.data(), 0, values.size() * sizeof(float));
}

static void gather_columns(const Ffn & ffn, const Core & core, Scratch & scratch) {
    const int64_t n_core = static_cast<int64_t>(core.neurons.size());
    const int64_t n_pad  = core.down->ne[0];

    // what stands for the neurons left out, zero where one is kept
    std::vector<float> rest = core.fill;
    if (!rest.empty()) {
        for (int32_t neuron : core.neurons) {
            rest[neuron] = 0.0f;
        }
    }
    std::vector<float> bias = read_bias(ffn.down_b, ffn.n_out());
    std::vector<float> kept(n_pad, 0.0f);
    Output             output(core.down, scratch);
    for_each_down_row(ffn, scratch, [&](int64_t row, const float * weights) {
        if (!rest.empty()) {
            bias[row] += dot(weights, rest.data(), ffn.n_ff());
        }
        gather(weights, core.neurons.data(), kept.data(), n_core);
        quantize_row(core.down->type, kept.data(), output.row(row), n_pad);
    });
    output.finish();
    if (core.down_b) {
        set_vector(core.down_b, bias);
    }
}

// A tensor as it is.
static void copy_whole(const FileTensor & file, ggml_tensor * to, Scratch & scratch) {
    std::vector<int32_t> rows(to->ne[1]);
    std::iota(rows.begin(), rows.end(), 0);
    Output output(to, scratch);
    copy_rows(file, to->nb[1], 0, rows, output, 0, scratch);
    output.finish();
}

static void copy_down(const Ffn & ffn, const Core & core, Scratch & scratch) {
    copy_whole(ffn.down_file, core.down, scratch);
    if (core.down_b) {
        set_vector(core.down_b, read_bias(ffn.down_b, ffn.n_out()));
    }
}

static void gather_bias(const Ffn & ffn, const Core & core, const ggml_tensor * bias, ggml_tensor * compact,
                        bool fused) {
    const int64_t            n_parts = fused ? 2 : 1;
    const int64_t            n_pad   = compact->ne[0] / n_parts;
    const std::vector<float> values  = read_bias(bias, n_parts * ffn.n_ff());
    std::vector<float>       kept(compact->ne[0], 0.0f);
    for (int64_t part = 0; part < n_parts; ++part) {
        gather(values.data() + part * ffn.n_ff(), core.neurons.data(), kept.data() + part * n_pad,
               static_cast<int64_t>(core.neurons.size()));
    }
    set_vector(compact, kept);
}

void gather_cores(const std::vector<Ffn> & ffns, std::vector<Core> & cores, const std::vector<size_t> & which,
                  int n_threads) {
    const bool                                  packs = may_pack(ffns);
    std::vector<std::function<void(Scratch &)>> tasks;
    for (size_t i : which) {
        const Ffn & ffn  = ffns[i];
        Core &      core = cores[i];
        if (!core.up) {
            make_tensors(ffn, core, packs);
        }
        tasks.push_back([&](Scratch & scratch) {
            if (core.whole) {
                copy_down(ffn, core, scratch);
            } else {
                gather_columns(ffn, core, scratch);
            }
        });
        tasks.push_back([&](Scratch & scratch) { gather_rows(ffn, core, ffn.up_file, core.up, ffn.fused, scratch); });
        if (core.gate) {
            tasks.push_back(
                [&](Scratch & scratch) { gather_rows(ffn, core, ffn.gate_file, core.gate, false, scratch); });
        }
        if (core.up_b) {
            gather_bias(ffn, core, ffn.up_b, core.up_b, ffn.fused);
        }
        if (core.gate_b) {
            gather_bias(ffn, core, ffn.gate_b, core.gate_b, false);
        }
    }
    run_parallel(tasks.size(), n_threads, [&](size_t i, Scratch & scratch) { tasks[i](scratch); });
}

// Whether ggml's layout of this weight is as fast for one token as ours: Q4_0 with AMX (Sapphire Rapids, 2 cores, 1B
// Llama: 33.4 and 33.2 tok/s; Q4_K 21 and 29).
static bool is_fast_already(const ggml_tensor * weights) {
    const char * layout = ggml_backend_buft_name(ggml_backend_buffer_get_type(weights->buffer));
    return weights->type == GGML_TYPE_Q4_0 && std::strcmp(layout, "AMX") == 0;
}

bool can_copy_packed(const ggml_tensor * weights) {
    if (!weights->buffer || !ggml_is_matrix(weights) || !is_packable(weights->type, weights->ne[0], weights->ne[1])) {
        return false;
    }
    return is_on_cpu(ggml_backend_buffer_get_type(weights->buffer)) && !is_fast_already(weights);
}

std::vector<PackedCopy> copy_packed(const std::vector<const ggml_tensor *> & weights, const TensorFiles & files,
                                    int n_threads) {
    std::vector<PackedCopy> copies(weights.size());
    for (size_t i = 0; i < copies.size(); ++i) {
        PackedCopy & copy = copies[i];
        copy.context.reset(ggml_init({ ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true }));
        if (copy.context) {
            copy.tensor =
                ggml_new_tensor_2d(copy.context.get(), weights[i]->type, weights[i]->ne[0], weights[i]->ne[1]);
            copy.buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(copy.context.get(), packed_buffer_type()));
        }
        if (!copy.buffer) {
            throw Error(COREINFER_NO_MEMORY, std::string("no memory for a copy of ") + ggml_get_name(weights[i]));
        }
    }
    run_parallel(copies.size(), n_threads,
                 [&](size_t i, Scratch & scratch) { copy_whole(*files.find(weights[i]), copies[i].tensor, scratch); });
    return copies;
}

void down_norms(const std::vector<Ffn> & ffns, float * norms, int n_threads) {
    std::vector<float *> parts;
    for (const Ffn & ffn : ffns) {
        parts.push_back(norms);
        norms += ffn.n_ff();
    }
    run_parallel(ffns.size(), n_threads, [&](size_t i, Scratch & scratch) {
        const int64_t n_ff = ffns[i].n_ff();
        std::fill_n(parts[i], n_ff, 0.0f);
        for_each_down_row(ffns[i], scratch,
                          [&](int64_t, const float * weights) { add_squares(weights, parts[i], n_ff); });
    });
}

} // namespace coreinfer
