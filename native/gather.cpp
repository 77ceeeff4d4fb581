#include "gather.h"

#include "kernels/device_levels.h"
#include "kernels/low_bits.h"
#include "placement.h"
#include "quant.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <utility>

namespace coreinfer {

// How much of a file is read at a time: several rows, and little enough to stay in the cache.
constexpr size_t kChunk = 256 * 1024;

// Rows that are sent to a device at once.
constexpr int64_t kDeviceRows = 512;

// Devices store weights as files do, so that any number of rows can be sent.
static bool is_on_device(const ggml_tensor * tensor) {
    ggml_backend_dev_t device = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(tensor->buffer));
    return device && ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_CPU;
}

// Where the bytes of a tensor are written, row after row: in place, or, if its layout is its buffer's own
// affair, to be handed over, a group of rows at a time where the layout allows it.
class Output {
  public:
    Output(ggml_tensor * tensor, Scratch & scratch) :
        tensor_(tensor),
        staged_(!ggml_backend_buffer_is_host(tensor->buffer)),
        n_group_(tensor->ne[1]),
        row_size_(tensor->nb[1]),
        data_(static_cast<uint8_t *>(tensor->data)) {
        if (is_on_device(tensor)) {
            *this = Output(tensor, 0, tensor->ne[1]);
        } else if (staged_) {
            if (takes_rows(ggml_backend_buffer_get_type(tensor->buffer), tensor->type, tensor->ne[0])) {
                n_group_ = std::min(kRowGroup, n_group_);
            }
            data_ = Scratch::at_least(scratch.staging, n_group_ * row_size_);
        }
    }

    // For the n rows from base on of a tensor on a device.
    Output(ggml_tensor * tensor, int64_t base, int64_t n) :
        tensor_(tensor),
        n_on_device_(n),
        base_(base),
        staged_(true),
        n_group_(std::min(kDeviceRows, n)),
        row_size_(tensor->nb[1]),
        group_(n_group_ * row_size_),
        data_(group_.data()) {}

    // For one part of a mixed tensor.
    Output(ggml_tensor * tensor, const Mixed::Part & part) :
        tensor_(tensor),
        part_(&part),
        staged_(true),
        n_group_(kLanes),
        row_size_(row_size(part.type, part.n_in)),
        group_(n_group_ * row_size_),
        data_(group_.data()) {}

    // Rows are asked for in order, each is written before the next is asked for.
    uint8_t * row(int64_t i) {
        if (i >= first_ + n_group_) {
            hand_over();
            first_ = i / n_group_ * n_group_;
        }
        return data_ + (i - first_) * row_size_;
    }

    void finish() { hand_over(); }

  private:
    void hand_over() {
        if (part_) {
            set_mixed(tensor_, *part_, first_ / kLanes, data_);
        } else if (n_on_device_) {
            const int64_t n_rows = std::min(n_group_, n_on_device_ - first_);
            ggml_backend_tensor_set(tensor_, data_, (base_ + first_) * row_size_, n_rows * row_size_);
        } else if (staged_) {
            ggml_tensor rows = rows_of(tensor_, first_, std::min(n_group_, tensor_->ne[1] - first_));
            ggml_backend_tensor_set(&rows, data_, 0, rows.nb[2]);
        }
    }

    ggml_tensor *        tensor_;
    const Mixed::Part *  part_        = nullptr;
    int64_t              n_on_device_ = 0;
    int64_t              base_        = 0;
    bool                 staged_;
    int64_t              n_group_; // rows that are handed over at once
    size_t               row_size_;
    std::vector<uint8_t> group_; // of a part, or for a device
    int64_t              first_ = 0;
    uint8_t *            data_;
};

// Call visit(i, row) with the row first + neurons[i] of the file's tensor, for each i.
static void for_each_row(const FileTensor & file, size_t size, int64_t first, const std::vector<int32_t> & neurons,
                         Scratch & scratch, const std::function<void(int64_t, const uint8_t *)> & visit) {
    const size_t    rows_a_chunk = std::max<size_t>(1, kChunk / size);
    uint8_t * const chunk        = scratch.room(rows_a_chunk * size);
    for (size_t i = 0; i < neurons.size();) {
        // read up to the last wanted row that fits, unwanted ones between included: that beats many reads
        size_t end = i + 1;
        while (end < neurons.size() && static_cast<size_t>(neurons[end] - neurons[i]) < rows_a_chunk) {
            ++end;
        }
        const size_t    n_rows = neurons[end - 1] - neurons[i] + 1;
        const uint8_t * rows   = file.file->fetch(chunk, n_rows * size, file.offset + (first + neurons[i]) * size);
        for (const int32_t base = neurons[i]; i < end; ++i) {
            visit(static_cast<int64_t>(i), rows + (neurons[i] - base) * size);
        }
    }
}

// Copy the rows first + neurons[i] of the file's tensor to the rows start + i of the output.
static void copy_rows(const FileTensor & file, size_t size, int64_t first, const std::vector<int32_t> & neurons,
                      Output & output, int64_t start, Scratch & scratch) {
    for_each_row(file, size, first, neurons, scratch,
                 [&](int64_t i, const uint8_t * row) { std::memcpy(output.row(start + i), row, size); });
}

// All-zero blocks are zero weights in every type.
static void zero_rows(Output & output, size_t size, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
        std::memset(output.row(i), 0, size);
    }
}

static void quantize_level_row(coreinfer_level level, ggml_type type, const float * weights, int64_t n, uint8_t * row) {
    if (is_low(type)) {
        quantize_low_row(type, weights, n, row);
    } else if (level == COREINFER_LEVEL_FULL) {
        quantize_row(type, weights, row, n);
    } else {
        quantize_device_row(type, weights, n, row);
    }
}

// A matrix of each level of a core set.
using Matrices = std::vector<ggml_tensor *>;

static Matrices matrices_of(const Core & core, ggml_tensor * Core::* first, ggml_tensor * llama_ffn::* other) {
    Matrices result = { core.*first };
    for (const llama_ffn & ffn : core.also) {
        result.push_back(ffn.*other);
    }
    return result;
}

// As gather_rows(), if the neurons have levels. The file is read once for all levels. matrices: one of all levels on
// the CPU, one of each on a device.
static void gather_mixed_rows(const Ffn & ffn, const Core & core, const FileTensor & file, ggml_type from,
                              const Matrices & matrices, bool fused, Scratch & scratch) {
    const int64_t              n_in     = matrices[0]->ne[0];
    const size_t               size     = row_size(from, n_in);
    const std::vector<Segment> segments = core.segments();
    float * const              weights  = Scratch::at_least(scratch.weights, n_in);
    const auto * part = core.on_device ? nullptr : static_cast<const Mixed *>(matrices[0]->extra)->parts.data();
    for (int64_t half = 0; half < (fused ? 2 : 1); ++half) {
        std::vector<Output>    outputs; // of the levels that there are
        std::vector<ggml_type> types;
        int64_t                n_written[COREINFER_N_LEVELS] = {};
        size_t                 of_level[COREINFER_N_LEVELS]  = {};
        for (size_t i = 0; i < segments.size(); ++i) {
            of_level[segments[i].level] = i;
            if (core.on_device) {
                outputs.emplace_back(matrices[i], half * segments[i].n_pad(), segments[i].n_pad());
                types.push_back(matrices[i]->type);
            } else {
                types.push_back(part->type);
                outputs.emplace_back(matrices[0], *part++);
            }
        }
        for_each_row(file, size, half * ffn.n_ff(), core.neurons, scratch, [&](int64_t i, const uint8_t * row) {
            const auto      level = static_cast<coreinfer_level>(core.levels[i]);
            const ggml_type type  = types[of_level[level]];
            uint8_t * const to    = outputs[of_level[level]].row(n_written[level]++);
            if (level == COREINFER_LEVEL_FULL && type == from) {
                std::memcpy(to, row, size);
            } else {
                dequantize_row(from, row, weights, n_in);
                quantize_level_row(level, type, weights, n_in, to);
            }
        });
        for (size_t i = 0; i < segments.size(); ++i) {
            zero_rows(outputs[i], row_size(types[i], n_in), n_written[segments[i].level], segments[i].n_pad());
            outputs[i].finish();
        }
    }
}

// from: the type of the file's tensor.
static void gather_rows(const Ffn & ffn, const Core & core, const FileTensor & file, ggml_type from,
                        const Matrices & matrices, bool fused, Scratch & scratch) {
    if (!core.levels.empty()) {
        return gather_mixed_rows(ffn, core, file, from, matrices, fused, scratch);
    }
    ggml_tensor * compact = matrices[0];
    const int64_t n_core  = static_cast<int64_t>(core.neurons.size());
    const int64_t n_parts = fused ? 2 : 1;
    const int64_t n_pad   = compact->ne[1] / n_parts;
    const size_t  size    = compact->nb[1];

    Output output(compact, scratch);
    for (int64_t part = 0; part < n_parts; ++part) {
        copy_rows(file, size, part * ffn.n_ff(), core.neurons, output, part * n_pad, scratch);
        zero_rows(output, size, part * n_pad + n_core, (part + 1) * n_pad);
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
    const std::vector<Segment> segments = core.segments();

    // what stands for the neurons left out, zero where one is kept
    std::vector<float> rest = core.fill;
    if (!rest.empty()) {
        for (int32_t neuron : core.neurons) {
            rest[neuron] = 0.0f;
        }
    }
    std::vector<float>  bias = read_bias(ffn.down_b, ffn.n_out());
    std::vector<float>  kept(core.n_pad(), 0.0f);
    std::vector<Output> outputs;
    outputs.reserve(segments.size());
    const bool             mixed    = !core.levels.empty() && !core.on_device;
    const Matrices         matrices = matrices_of(core, &Core::down, &llama_ffn::down);
    std::vector<ggml_type> types;
    for (size_t i = 0; i < segments.size(); ++i) {
        if (mixed) {
            const Mixed::Part & part = static_cast<const Mixed *>(core.down->extra)->parts[i];
            types.push_back(part.type);
            outputs.emplace_back(core.down, part);
        } else {
            types.push_back(matrices[i]->type);
            outputs.emplace_back(matrices[i], scratch);
        }
    }
    for_each_down_row(ffn, scratch, [&](int64_t row, const float * weights) {
        if (!rest.empty()) {
            bias[row] += dot(weights, rest.data(), ffn.n_ff());
        }
        float * to = kept.data();
        for (size_t i = 0; i < segments.size(); ++i) {
            const std::vector<int32_t> & neurons = segments[i].neurons;
            const int64_t                n_pad   = segments[i].n_pad();
            gather(weights, neurons.data(), to, static_cast<int64_t>(neurons.size()));
            quantize_level_row(segments[i].level, types[i], to, n_pad, outputs[i].row(row));
            to += n_pad;
        }
    });
    for (Output & output : outputs) {
        output.finish();
    }
    if (core.down_b) {
        set_vector(core.down_b, bias);
    }
}

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

// biases: as the matrices of gather_mixed_rows().
static void gather_bias(const Ffn & ffn, const Core & core, const ggml_tensor * bias, const Matrices & biases,
                        bool fused) {
    const int64_t              n_parts  = fused ? 2 : 1;
    const std::vector<float>   values   = read_bias(bias, n_parts * ffn.n_ff());
    const std::vector<Segment> segments = core.segments();
    const size_t               n_each   = segments.size() / biases.size();
    for (size_t i = 0; i < biases.size(); ++i) {
        std::vector<float> kept(biases[i]->ne[0], 0.0f);
        float *            to = kept.data();
        for (int64_t part = 0; part < n_parts; ++part) {
            for (size_t j = i * n_each; j < (i + 1) * n_each; ++j) {
                gather(values.data() + part * ffn.n_ff(), segments[j].neurons.data(), to,
                       static_cast<int64_t>(segments[j].neurons.size()));
                to += segments[j].n_pad();
            }
        }
        set_vector(biases[i], kept);
    }
}

// The parts of a compact up or gate, which has its neurons n_halves times.
static Mixed rows_by_level(const std::vector<Segment> & segments, ggml_type full, int64_t n_in, int64_t n_halves) {
    Mixed   mixed;
    int64_t first = 0;
    for (int64_t half = 0; half < n_halves; ++half) {
        for (const Segment & segment : segments) {
            const ggml_type type = segment.level == COREINFER_LEVEL_FULL ? full : low_type(segment.level);
            mixed.add({ type, 0, n_in, first, segment.n_pad() / kLanes });
            first += segment.n_pad() / kLanes;
        }
    }
    return mixed;
}

static Mixed columns_by_level(const std::vector<Segment> & segments, ggml_type full, int64_t n_out) {
    Mixed   mixed;
    int64_t first = 0;
    for (const Segment & segment : segments) {
        const ggml_type type = segment.level == COREINFER_LEVEL_FULL ? full : low_type(segment.level);
        mixed.add({ type, first, segment.n_pad(), 0, n_out / kLanes });
        first += segment.n_pad();
    }
    return mixed;
}

// An FFN for the neurons of each level.
static void make_device_matrices(const Ffn & ffn, Core & core, const std::vector<Segment> & segments,
                                 Placement & placement) {
    for (const Segment & segment : segments) {
        const int64_t n    = segment.n_pad();
        const auto    type = [&](const ggml_tensor * of, bool columns) {
            return device_level_type(segment.level, of->type, columns, of->ne[0]);
        };
        llama_ffn part = {};
        part.up        = placement.matrix(type(ffn.up, false), ffn.n_in(), (ffn.fused ? 2 : 1) * n, "core_ffn_up");
        part.gate      = ffn.gate ? placement.matrix(type(ffn.gate, false), ffn.n_in(), n, "core_ffn_gate") : nullptr;
        part.down      = placement.matrix(type(ffn.down, true), n, ffn.n_out(), "core_ffn_down");
        part.up_b      = ffn.up_b ? placement.vector(ffn.fused ? 2 * n : n, "core_ffn_up_b") : nullptr;
        part.gate_b    = ffn.gate_b ? placement.vector(n, "core_ffn_gate_b") : nullptr;
        if (core.up) {
            core.also.push_back(part);
        } else {
            core.up     = part.up;
            core.gate   = part.gate;
            core.down   = part.down;
            core.up_b   = part.up_b;
            core.gate_b = part.gate_b;
        }
    }
}

static void make_matrices(const Ffn & ffn, Core & core, Placement & placement) {
    const int64_t   n_pad    = core.whole ? ffn.n_ff() : core.n_pad();
    const int64_t   n_halves = ffn.fused ? 2 : 1;
    const ggml_type down     = core.whole ? ffn.down->type : column_type(ffn.down->type);
    if (core.levels.empty()) {
        core.up   = placement.matrix(ffn.up->type, ffn.n_in(), n_halves * n_pad, "core_ffn_up");
        core.gate = ffn.gate ? placement.matrix(ffn.gate->type, ffn.n_in(), n_pad, "core_ffn_gate") : nullptr;
        core.down = placement.matrix(down, n_pad, ffn.n_out(), "core_ffn_down");
        return;
    }
    const std::vector<Segment> segments = core.segments();
    if (core.on_device) {
        return make_device_matrices(ffn, core, segments, placement);
    }
    const auto mixed = [&](Mixed parts, ggml_type type, int64_t n_in, int64_t n_out, const char * name) {
        core.mixed.push_back(std::make_unique<Mixed>(std::move(parts)));
        return placement.mixed(type, n_in, n_out, *core.mixed.back(), name);
    };
    const ggml_type up = mixed_type(ffn.up->type);
    core.up = mixed(rows_by_level(segments, up, ffn.n_in(), n_halves), up, ffn.n_in(), n_halves * n_pad, "core_ffn_up");
    if (ffn.gate) {
        const ggml_type gate = mixed_type(ffn.gate->type);
        core.gate = mixed(rows_by_level(segments, gate, ffn.n_in(), 1), gate, ffn.n_in(), n_pad, "core_ffn_gate");
    }
    const ggml_type full = mixed_column_type(ffn.down->type);
    core.down =
        mixed(columns_by_level(segments, full, ffn.n_out()), mixed_type(down), n_pad, ffn.n_out(), "core_ffn_down");
}

static void make_tensors(const Ffn & ffn, Core & core, bool packs) {
    const int64_t n_pad = core.whole ? ffn.n_ff() : core.n_pad();

    Placement placement(ffn, packs);
    make_matrices(ffn, core, placement);
    if (core.levels.empty() || !core.on_device) {
        core.up_b   = ffn.up_b ? placement.vector(ffn.fused ? 2 * n_pad : n_pad, "core_ffn_up_b") : nullptr;
        core.gate_b = ffn.gate_b ? placement.vector(n_pad, "core_ffn_gate_b") : nullptr;
    }
    core.down_b = ffn.down_b || !core.fill.empty() ? placement.vector(ffn.n_out(), "core_ffn_down_b") : nullptr;
    placement.allocate(core);
}

void gather_cores(const std::vector<Ffn> & ffns, std::vector<Core> & cores, const std::vector<size_t> & which,
                  bool packs, int n_threads) {
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
        tasks.push_back([&](Scratch & scratch) {
            gather_rows(ffn, core, ffn.up_file, ffn.up->type, matrices_of(core, &Core::up, &llama_ffn::up), ffn.fused,
                        scratch);
        });
        if (core.gate) {
            tasks.push_back([&](Scratch & scratch) {
                gather_rows(ffn, core, ffn.gate_file, ffn.gate->type, matrices_of(core, &Core::gate, &llama_ffn::gate),
                            false, scratch);
            });
        }
        if (core.up_b) {
            gather_bias(ffn, core, ffn.up_b, matrices_of(core, &Core::up_b, &llama_ffn::up_b), ffn.fused);
        }
        if (core.gate_b) {
            gather_bias(ffn, core, ffn.gate_b, matrices_of(core, &Core::gate_b, &llama_ffn::gate_b), false);
        }
    }
    run_parallel(tasks.size(), n_threads, [&](size_t i, Scratch & scratch) { tasks[i](scratch); });
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
