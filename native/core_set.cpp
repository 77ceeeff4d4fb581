#include "core_set.h"

#include "context.h"
#include "error.h"
#include "gather.h"
#include "kernels/device_levels.h"
#include "kernels/low_bits.h"
#include "placement.h"
#include "quant.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#ifdef __GLIBC__
#    include <malloc.h>
#endif

namespace coreinfer {

uint64_t Core::n_bytes() const {
    uint64_t sum = bytes_of({ up, up_b, gate, gate_b, down, down_b });
    for (const llama_ffn & ffn : also) {
        sum += bytes_of({ ffn.up, ffn.up_b, ffn.gate, ffn.gate_b, ffn.down });
    }
    return sum;
}

static bool same_sizes(const std::vector<Segment> & a, const std::vector<Segment> & b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Segment & one, const Segment & other) {
        return one.level == other.level && one.n_pad() == other.n_pad();
    });
}

bool Core::fits(const Core & other) const {
    return other.up && !neurons.empty() && whole == other.whole && levels.empty() == other.levels.empty() &&
           fill.empty() == other.fill.empty() && same_sizes(segments(), other.segments());
}

int64_t Segment::n_pad() const {
    return GGML_PAD(static_cast<int64_t>(neurons.size()), block);
}

std::vector<Segment> Core::segments() const {
    if (levels.empty()) {
        return { { COREINFER_LEVEL_FULL, neurons, kBlock } };
    }
    std::vector<Segment> result;
    for (int level = 0; level < COREINFER_N_LEVELS; ++level) {
        const bool by_device = on_device && level != COREINFER_LEVEL_FULL;
        Segment    segment   = { static_cast<coreinfer_level>(level), {}, by_device ? kDeviceBlock : kBlock };
        for (size_t i = 0; i < neurons.size(); ++i) {
            if (levels[i] == level) {
                segment.neurons.push_back(neurons[i]);
            }
        }
        if (!segment.neurons.empty()) {
            result.push_back(std::move(segment));
        }
    }
    return result;
}

int64_t Core::n_pad() const {
    int64_t sum = 0;
    for (const Segment & segment : segments()) {
        sum += segment.n_pad();
    }
    return sum;
}

float level_bytes(coreinfer_level level, ggml_type type, bool columns, int64_t n) {
    if (!is_mixable(mixed_type(columns ? column_type(type) : type), n, kLanes)) {
        return 0.0f;
    }
    const ggml_type full = columns ? mixed_column_type(type) : mixed_type(type);
    return static_cast<float>(row_size(level == COREINFER_LEVEL_FULL ? full : low_type(level), n));
}

ggml_type device_level_type(coreinfer_level level, ggml_type type, bool columns, int64_t n) {
    if (level == COREINFER_LEVEL_FULL) {
        return columns ? column_type(type) : type;
    }
    const ggml_type of_level = device_type(level, columns ? kDeviceBlock : n);
    if (of_level != GGML_TYPE_COUNT) {
        return of_level;
    }
    // the next best: what is smaller than the stored type at least
    const ggml_type more = device_type(COREINFER_LEVEL_4_BITS, n);
    return more != GGML_TYPE_COUNT && ggml_row_size(more, n) < ggml_row_size(type, n) ? more : GGML_TYPE_COUNT;
}

namespace {

// The types of the rows of up and gate, and of those of down, at a level on the device of an FFN; GGML_TYPE_COUNT if
// the device or the widths do not allow it.
struct DeviceTypes {
    ggml_type up;
    ggml_type gate;
    ggml_type down;

    DeviceTypes(const Ffn & ffn, coreinfer_level level) :
        up(device_level_type(level, ffn.up->type, false, ffn.n_in())),
        gate(ffn.gate ? device_level_type(level, ffn.gate->type, false, ffn.n_in()) : up),
        down(device_level_type(level, ffn.down->type, true, kDeviceBlock)) {}

    bool run_on(const Ffn & ffn) const {
        return runs_on(ffn.device, up, ffn.n_in(), kDeviceBlock) &&
               (gate == up || runs_on(ffn.device, gate, ffn.n_in(), kDeviceBlock)) &&
               runs_on(ffn.device, down, kDeviceBlock, ffn.n_out());
    }
};

// Of the weights, relative to their squares: tools/measure_levels.py measures it.
float error_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_0:
            return 0.0066f;
        case GGML_TYPE_Q3_K:
            return 0.0206f;
        case GGML_TYPE_Q2_K:
            return 0.0693f;
        case GGML_TYPE_Q2_0:
            return 0.143f;
        default:
            return 0.001f;
    }
}

float device_neuron_bytes(const Ffn & ffn, coreinfer_level level) {
    const DeviceTypes types(ffn, level);
    if (level != COREINFER_LEVEL_FULL && !types.run_on(ffn)) {
        return 0.0f;
    }
    const float rows = static_cast<float>((ffn.fused ? 2 : 1) * row_size(types.up, ffn.n_in()) +
                                          (ffn.gate ? row_size(types.gate, ffn.n_in()) : 0));
    return rows +
           static_cast<float>(ffn.n_out()) / kDeviceBlock * static_cast<float>(row_size(types.down, kDeviceBlock));
}

} // namespace

float neuron_error(const Ffn & ffn, coreinfer_level level) {
    if (!ffn.device || level == COREINFER_LEVEL_FULL) {
        constexpr float kErrors[COREINFER_N_LEVELS] = { 0.003f, 0.01f, 0.05f, 0.22f };
        return kErrors[level];
    }
    const DeviceTypes types(ffn, level);
    const float       gate = ffn.gate || ffn.fused ? error_of(types.gate) : 0.0f;
    return error_of(types.up) + gate + error_of(types.down);
}

float neuron_bytes(const Ffn & ffn, coreinfer_level level, bool packs) {
    if (ffn.device) {
        return device_neuron_bytes(ffn, level);
    }
    std::vector<ggml_type> rows(ffn.fused ? 2 : 1, ffn.up->type);
    if (ffn.gate) {
        rows.push_back(ffn.gate->type);
    }
    const float columns  = static_cast<float>(ffn.n_out()) / kSuper;
    float       of_level = columns * level_bytes(level, ffn.down->type, true, kSuper);
    float       stored   = columns * static_cast<float>(row_size(column_type(ffn.down->type), kSuper));
    bool        mixes    = packs && of_level > 0.0f && ffn.n_out() % kLanes == 0;
    for (ggml_type type : rows) {
        const float row = level_bytes(level, type, false, ffn.n_in());
        mixes           = mixes && row > 0.0f;
        of_level += row;
        stored += static_cast<float>(row_size(type, ffn.n_in()));
    }
    return mixes ? of_level : level == COREINFER_LEVEL_FULL ? stored : 0.0f;
}

namespace {

// What has been freed goes back to the system, and not to the next that asks for memory.
void trim() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

// The levels of the neurons, checked; none if all are in full.
std::vector<uint8_t> levels_of(const coreinfer_context & ctx, const coreinfer_core & wanted,
                               const std::string & where) {
    std::vector<uint8_t> levels(wanted.levels, wanted.levels + wanted.n_neurons);
    bool                 possible[COREINFER_N_LEVELS];
    for (int level = 0; level < COREINFER_N_LEVELS; ++level) {
        possible[level] = neuron_bytes(ctx.ffns[wanted.ffn], static_cast<coreinfer_level>(level), ctx.packs) > 0.0f;
    }
    for (size_t i = 0; i < levels.size(); ++i) {
        if (levels[i] >= COREINFER_N_LEVELS) {
            throw Error(COREINFER_INVALID, where + "level " + std::to_string(levels[i]) + " at position " +
                                               std::to_string(i) + " is not below " +
                                               std::to_string(COREINFER_N_LEVELS));
        }
        if (!possible[levels[i]]) {
            throw Error(COREINFER_UNSUPPORTED, where + "its neurons cannot have levels");
        }
    }
    const Ffn & ffn = ctx.ffns[wanted.ffn];
    const bool  is_stored =
        ffn.device || (mixed_type(ffn.up->type) == ffn.up->type && mixed_type(ffn.down->type) == ffn.down->type &&
                       (!ffn.gate || mixed_type(ffn.gate->type) == ffn.gate->type));
    const bool all_full =
        std::all_of(levels.begin(), levels.end(), [](uint8_t l) { return l == COREINFER_LEVEL_FULL; });
    return all_full && (is_stored || !possible[COREINFER_LEVEL_2_BITS]) ? std::vector<uint8_t>() : levels;
}

// The members that tell one core set from another, checked.
Core make_core(const coreinfer_context & ctx, const coreinfer_core & wanted) {
    const std::string where = "core set of FFN " + std::to_string(wanted.ffn) + ": ";
    if (wanted.ffn < 0 || wanted.ffn >= static_cast<int32_t>(ctx.ffns.size())) {
        throw Error(COREINFER_INVALID, where + "the model has " + std::to_string(ctx.ffns.size()) + " dense FFNs");
    }
    const int64_t n_ff = ctx.ffns[wanted.ffn].n_ff();
    if (!wanted.neurons || wanted.n_neurons < 1 || wanted.n_neurons > n_ff) {
        throw Error(COREINFER_INVALID, where + "it needs 1 to " + std::to_string(n_ff) + " neurons, not " +
                                           std::to_string(wanted.n_neurons));
    }
    for (int32_t i = 0; i < wanted.n_neurons; ++i) {
        if (wanted.neurons[i] < 0 || wanted.neurons[i] >= n_ff ||
            (i > 0 && wanted.neurons[i] <= wanted.neurons[i - 1])) {
            throw Error(COREINFER_INVALID, where + "neuron " + std::to_string(wanted.neurons[i]) + " at position " +
                                               std::to_string(i) + " is not in ascending order below " +
                                               std::to_string(n_ff));
        }
    }
    Core core;
    core.on_device = ctx.ffns[wanted.ffn].device != nullptr;
    core.neurons.assign(wanted.neurons, wanted.neurons + wanted.n_neurons);
    if (wanted.levels) {
        core.levels = levels_of(ctx, wanted, where);
    }
    core.whole = wanted.n_neurons == n_ff &&
                 core.levels.empty(); // then what the FFN gives is what the dense one gives, to the last bit
    if (wanted.fill && wanted.n_neurons < n_ff) {
        core.fill.assign(wanted.fill, wanted.fill + n_ff);
    }
    return core;
}

} // namespace

void set_cores(coreinfer_context & ctx, const coreinfer_core * wanted, int32_t n_wanted) {
    std::vector<Core> cores(ctx.ffns.size());
    for (int32_t i = 0; i < n_wanted; ++i) {
        Core core = make_core(ctx, wanted[i]);
        if (!cores[wanted[i].ffn].neurons.empty()) {
            throw Error(COREINFER_INVALID, "FFN " + std::to_string(wanted[i].ffn) + " is named twice");
        }
        cores[wanted[i].ffn] = std::move(core);
    }
    if (ctx.stream) {
        ctx.stream->end();
    }
    if (n_wanted > 0) {
        for (size_t i = 0; i < cores.size(); ++i) {
            if (cores[i].neurons.empty() && (ctx.stream || ctx.ffns[i].is_far())) {
                cores[i].whole = true;
                cores[i].neurons.resize(ctx.ffns[i].n_ff());
                std::iota(cores[i].neurons.begin(), cores[i].neurons.end(), 0);
            }
        }
    }
    // keep what stays as it is, write over what has the size, free the rest before the new takes its memory
    std::vector<size_t> changed;
    for (size_t i = 0; i < cores.size(); ++i) {
        Core & now = ctx.cores[i];
        if (cores[i].neurons == now.neurons && cores[i].levels == now.levels && cores[i].fill == now.fill &&
            cores[i].whole == now.whole) {
            cores[i] = std::move(now);
            continue;
        }
        if (cores[i].fits(now)) {
            now.neurons = std::move(cores[i].neurons);
            now.levels  = std::move(cores[i].levels);
            now.fill    = std::move(cores[i].fill);
            cores[i]    = std::move(now);
        }
        if (!cores[i].neurons.empty()) {
            changed.push_back(i);
        }
    }
    ctx.cores = std::move(cores);
    if (ctx.stream) {
        trim();
    }
    if (!changed.empty()) {
        ctx.files.check_unchanged();
    }
    gather_cores(ctx.ffns, ctx.cores, changed, ctx.packs, ctx.n_threads);
}

} // namespace coreinfer
