#include "context.h"
#include "core_set.h"
#include "coreinfer.h"
#include "devices.h"
#include "error.h"
#include "gather.h"
#include "ggml.h"
#include "kernels/device_levels.h"
#include "kernels/low_bits.h"
#include "kernels/packed_layout.h"
#include "kernels/packed_weights.h"
#include "llama-ext.h"
#include "llama-unread.h"
#include "quant.h"
#include "unread_buffer.h"

#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

using namespace coreinfer;

namespace {

thread_local std::string last_error;

// Keep why a call failed; without the memory for it there is no reason, but a status.
coreinfer_status failed(coreinfer_status status, const char * reason) noexcept {
    try {
        last_error = reason;
    } catch (...) {
        last_error.clear();
    }
    return status;
}

// Run body, and turn what it throws into a status: nothing may be thrown through the C interface.
template <typename Body>
coreinfer_status guarded(Body body) noexcept {
    try {
        body();
        return COREINFER_OK;
    } catch (const Error & error) {
        return failed(error.status, error.what());
    } catch (const std::bad_alloc &) {
        return failed(COREINFER_NO_MEMORY, "out of memory");
    } catch (const std::exception & error) {
        return failed(COREINFER_INTERNAL, error.what());
    } catch (...) {
        return failed(COREINFER_INTERNAL, "unknown exception");
    }
}

// The context; NULL, which a caller is left with after coreinfer_free, is an error and no crash.
template <typename Context>
Context & alive(Context * ctx) {
    if (!ctx) {
        throw Error(COREINFER_INVALID, "this coreinfer_context is NULL: it was freed, or never made");
    }
    return *ctx;
}

WeightStream & stream_of(coreinfer_context & ctx) {
    ctx.settle();
    if (!ctx.stream) {
        throw Error(COREINFER_INVALID, "the weights of this model are in memory: there is nothing to stream");
    }
    return *ctx.stream;
}

const Ffn & ffn_at(const coreinfer_context * ctx, int32_t i) {
    alive(ctx).settle(); // the tensors are the model's
    if (i < 0 || i >= static_cast<int32_t>(ctx->ffns.size())) {
        throw Error(COREINFER_INVALID,
                    "FFN " + std::to_string(i) + ": the model has " + std::to_string(ctx->ffns.size()) + " dense FFNs");
    }
    return ctx->ffns[i];
}

} // namespace

int32_t coreinfer_api_version(void) {
    return COREINFER_API_VERSION;
}

void coreinfer_constants_get(coreinfer_constants * result) {
    *result = { static_cast<int32_t>(kBlock),
                static_cast<int32_t>(kDeviceBlock),
                static_cast<int32_t>(RowLookup::kMostRows),
                static_cast<int32_t>(WeightStream::kLeastChunks),
                WeightStream::kChunk,
                WeightsAhead::kAhead,
                kKernelNames };
}

const char * coreinfer_last_error(void) {
    return last_error.c_str();
}

const char * coreinfer_kernels_here(void) {
    static const std::string names = [] {
        std::string joined;
        for (const PackedKernels * kernels : packed_kernels()) {
            joined += joined.empty() ? "" : " ";
            joined += kernels->name;
        }
        return joined;
    }();
    return names.c_str();
}

const char * coreinfer_kernels_chosen(void) {
    const PackedKernels * chosen = chosen_kernels();
    return chosen ? chosen->name : "none";
}

bool coreinfer_load_packed(bool on, bool tied) {
    try {
        const bool can = packed_buffer_type(); // also for core sets of models that are not packed
        load_packed(on && can, tied);
        return on && can;
    } catch (const std::exception &) {
        return false; // there is no memory: loading will say so
    }
}

coreinfer_status coreinfer_new(llama_context * llama, const char * const * paths, int32_t n_paths, int32_t n_threads,
                               bool packed, coreinfer_context ** result) {
    return guarded([&] {
        if (!llama || !paths || n_paths < 1 || !result) {
            throw Error(COREINFER_INVALID,
                        "a llama_context, the path of a model file and a place for the result are needed");
        }
        std::unique_ptr<coreinfer_context> ctx(
            new coreinfer_context(llama, std::vector<std::string>(paths, paths + n_paths), n_threads, packed));
        ctx->attach();
        *result = ctx.release();
    });
}

void coreinfer_free(coreinfer_context * ctx) {
    delete ctx;
}

int32_t coreinfer_n_ffn(const coreinfer_context * ctx) {
    return ctx ? static_cast<int32_t>(ctx->ffns.size()) : 0;
}

coreinfer_status coreinfer_ffn_get(const coreinfer_context * ctx, int32_t ffn, coreinfer_ffn * result) {
    return guarded([&] {
        const Ffn & at = ffn_at(ctx, ffn);

        result->layer     = at.layer;
        result->n_in      = static_cast<int32_t>(at.n_in());
        result->n_ff      = static_cast<int32_t>(at.n_ff());
        result->n_out     = static_cast<int32_t>(at.n_out());
        result->up_type   = at.up->type;
        result->down_type = at.down->type;
        result->gated     = at.fused || at.gate;
        result->n_bytes   = at.n_bytes();
        for (int level = 0; level < COREINFER_N_LEVELS; ++level) {
            result->neuron_bytes[level]  = neuron_bytes(at, static_cast<coreinfer_level>(level), ctx->packs);
            result->neuron_errors[level] = neuron_error(at, static_cast<coreinfer_level>(level));
        }
        result->block = static_cast<int32_t>(at.device ? kDeviceBlock : kBlock);
    });
}

// Whether ggml has weights of this type.
static bool is_type(int32_t type) {
    return type >= 0 && type < GGML_TYPE_COUNT && ggml_blck_size(static_cast<ggml_type>(type)) > 0;
}

float coreinfer_level_bytes(coreinfer_level level, int32_t type, bool columns, int64_t n) {
    if (level < 0 || level >= COREINFER_N_LEVELS || !is_type(type) || n < 0) {
        return 0.0f;
    }
    return level_bytes(level, static_cast<ggml_type>(type), columns, n);
}

float coreinfer_device_level_bytes(coreinfer_level level, int32_t type, bool columns, int64_t n) {
    if (level < 0 || level >= COREINFER_N_LEVELS || !is_type(type) || n < 0) {
        return 0.0f;
    }
    const ggml_type stored = device_level_type(level, static_cast<ggml_type>(type), columns, n);
    return stored == GGML_TYPE_COUNT ? 0.0f : static_cast<float>(ggml_row_size(stored, n));
}

int32_t coreinfer_column_type(int32_t type) {
    if (!is_type(type)) {
        return -1;
    }
    return column_type(static_cast<ggml_type>(type));
}

coreinfer_status coreinfer_stats_collect(coreinfer_context * ctx, bool on, uint32_t extra, float top_share) {
    return guarded([&] {
        alive(ctx).settle();
        if (extra & ~uint32_t(COREINFER_STAT_NORMALIZED | COREINFER_STAT_TOP | COREINFER_STAT_ACTIVE)) {
            throw Error(COREINFER_INVALID, std::to_string(extra) + " names a statistic that is not known");
        }
        if (!(top_share >= 0.0f && top_share <= 1.0f)) {
            throw Error(COREINFER_INVALID, "top_share must be from 0 to 1, not " + std::to_string(top_share));
        }
        ctx->extra = { (extra & COREINFER_STAT_NORMALIZED) != 0, (extra & COREINFER_STAT_TOP) != 0, top_share,
                       (extra & COREINFER_STAT_ACTIVE) != 0 };
        ctx->collect(on);
    });
}

coreinfer_status coreinfer_stats_clear(coreinfer_context * ctx) {
    return guarded([&] {
        alive(ctx).settle();
        ctx->statistics.clear();
    });
}

coreinfer_status coreinfer_stats_get(coreinfer_context * ctx, int32_t ffn, coreinfer_stats * result) {
    return guarded([&] {
        ffn_at(ctx, ffn);
        const Collected & collected = ctx->collected[ffn];
        const auto        get       = [](const ggml_tensor * tensor, float * dst) {
            if (dst) {
                ggml_backend_tensor_get(tensor, dst, 0, ggml_nbytes(tensor));
            }
        };
        get(collected.sum, result->sum);
        get(collected.sum_sq, result->sum_sq);
        get(collected.normalized_sq, result->normalized_sq);
        get(collected.top, result->top);
        get(collected.active, result->active);
        get(collected.count, &result->n_tokens);
    });
}

coreinfer_status coreinfer_down_norms(coreinfer_context * ctx, float * norms) {
    return guarded([&] {
        alive(ctx).settle();
        down_norms(ctx->ffns, norms, ctx->n_threads);
    });
}

coreinfer_status coreinfer_core_set(coreinfer_context * ctx, const coreinfer_core * cores, int32_t n_cores) {
    const coreinfer_status status = guarded([&] {
        alive(ctx).settle();
        if (n_cores < 0 || (n_cores > 0 && !cores)) {
            throw Error(COREINFER_INVALID, std::to_string(n_cores) + " core sets at no address or fewer than none");
        }
        set_cores(*ctx, cores, n_cores);
    });
    if (!ctx) {
        return status;
    }
    if (status != COREINFER_OK) {
        for (Core & core : ctx->cores) {
            core = Core();
        }
    }
    ctx->changed(true);
    return status;
}

coreinfer_status coreinfer_level_round(coreinfer_level level, const float * weights, int64_t n, float * result) {
    return guarded([&] {
        if (level <= COREINFER_LEVEL_FULL || level >= COREINFER_N_LEVELS || n < 0 || n % kBlock != 0) {
            throw Error(COREINFER_INVALID, "level " + std::to_string(level) + " or " + std::to_string(n) +
                                               " weights: only low levels round, and whole blocks of " +
                                               std::to_string(kBlock));
        }
        std::vector<uint8_t> row(row_size(low_type(level), n));
        quantize_low_row(low_type(level), weights, n, row.data());
        dequantize_low_row(low_type(level), row.data(), n, result);
    });
}

coreinfer_status coreinfer_device_level_round(coreinfer_level level, int32_t type, bool columns, const float * weights,
                                              int64_t n, float * result) {
    return guarded([&] {
        const bool      known = level > COREINFER_LEVEL_FULL && level < COREINFER_N_LEVELS && is_type(type);
        const ggml_type stored =
            known ? device_level_type(level, static_cast<ggml_type>(type), columns, n) : GGML_TYPE_COUNT;
        if (stored == GGML_TYPE_COUNT || n < 0 || n % ggml_blck_size(stored) != 0) {
            throw Error(COREINFER_INVALID, "level " + std::to_string(level) + " of " + std::to_string(n) +
                                               " weights of type " + std::to_string(type) +
                                               ": devices have no such rows");
        }
        std::vector<uint8_t> row(ggml_row_size(stored, n));
        quantize_device_row(stored, weights, n, row.data());
        dequantize_row(stored, row.data(), result, n);
    });
}

coreinfer_status coreinfer_core_use(coreinfer_context * ctx, bool on) {
    return guarded([&] {
        alive(ctx).settle();
        ctx->use(on ? COREINFER_CORE : COREINFER_DENSE);
    });
}

coreinfer_status coreinfer_graph_use(coreinfer_context * ctx, int32_t graph) {
    return guarded([&] {
        alive(ctx).settle();
        if (graph < COREINFER_DENSE || graph > COREINFER_VERIFY_THERE) {
            throw Error(COREINFER_INVALID, std::to_string(graph) + " is no coreinfer_graph");
        }
        ctx->use(static_cast<coreinfer_graph>(graph));
    });
}

uint64_t coreinfer_core_bytes(const coreinfer_context * ctx) {
    uint64_t sum = 0;
    for (size_t i = 0; ctx && ctx->llama && i < ctx->ffns.size(); ++i) {
        sum += ctx->cores[i].neurons.empty() ? ctx->ffns[i].n_bytes() : ctx->cores[i].n_bytes();
    }
    return sum;
}

ggml_backend_buffer_type * coreinfer_unread_buffer_type(void) {
    llama_set_unread_buffer_type(unread_buffer_type());
    return unread_buffer_type();
}

coreinfer_status coreinfer_stream_ahead(coreinfer_context * ctx, uint64_t n_bytes) {
    return guarded([&] { stream_of(alive(ctx)).set_ahead(static_cast<size_t>(n_bytes)); });
}

coreinfer_status coreinfer_stream_begin(coreinfer_context * ctx, int32_t n_passes) {
    return guarded([&] {
        if (n_passes < 1) {
            throw Error(COREINFER_INVALID, "streaming is for at least one evaluation");
        }
        WeightStream & stream = stream_of(alive(ctx));
        ctx->files.leave_cache(); // where weights are streamed, it has better uses
        stream.begin(n_passes);
        if (ctx->lookup) {
            ctx->lookup->take_error();
        }
    });
}

coreinfer_status coreinfer_stream_end(coreinfer_context * ctx, coreinfer_stream * result) {
    return guarded([&] {
        WeightStream &              stream  = stream_of(alive(ctx));
        const WeightStream::Figures figures = stream.figures();
        if (result) {
            *result = { figures.n_bytes, figures.read_seconds, figures.waited_seconds };
        }
        const std::optional<Error> of_rows = ctx->lookup ? ctx->lookup->take_error() : std::nullopt;
        stream.end();
        if (of_rows) {
            throw *of_rows;
        }
    });
}

int32_t coreinfer_n_devices(void) {
    return static_cast<int32_t>(devices().size());
}

coreinfer_status coreinfer_device_get(int32_t device, coreinfer_device * result) {
    return guarded([&] {
        const std::vector<ggml_backend_dev_t> all = devices();
        if (device < 0 || device >= static_cast<int32_t>(all.size()) || !result) {
            throw Error(COREINFER_INVALID, "there is no device " + std::to_string(device) + " of " +
                                               std::to_string(all.size()) + ", or no place for the result");
        }
        size_t free  = 0;
        size_t total = 0;
        ggml_backend_dev_memory(all[device], &free, &total);
        *result = { ggml_backend_dev_name(all[device]), ggml_backend_dev_description(all[device]), free, total };
    });
}

coreinfer_status coreinfer_rpc_add(const char * endpoint) {
    return guarded([&] { add_rpc_server(endpoint); });
}

bool coreinfer_rpc_lost(void) {
    return rpc_lost();
}

ggml_backend_buffer_type * coreinfer_host_buffer_type(void) {
    return ggml_backend_cpu_buffer_type();
}

coreinfer_status coreinfer_memory_get(const llama_context * llama, int32_t device, coreinfer_memory * result) {
    return guarded([&] {
        if (!llama || !result) {
            throw Error(COREINFER_INVALID, "a llama_context and a place for the result are needed");
        }
        *result = {};
        for (const auto & [type, size] : llama_get_memory_breakdown(llama)) {
            if (number_of_device(type) != device) {
                continue;
            }
            result->weights += type == unread_buffer_type() ? 0 : size.model;
            result->packed += type == packed_buffer_type() ? size.model : 0;
            result->cache += size.context;
            result->compute += size.compute;
        }
    });
}
