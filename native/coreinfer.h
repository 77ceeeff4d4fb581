#ifndef COREINFER_H
#define COREINFER_H

// CoreInfer for llama.cpp: collect the activation statistics of a prompt, gather a core set of FFN
// neurons into compact tensors, and decode with those (arXiv 2410.18311).
//
// A coreinfer_context belongs to one llama_context and is used from one thread at a time, as that is.
// Functions that can fail return a status; coreinfer_last_error() then says why, per thread.
// Arrays are the caller's before and after a call; what is kept is copied. No argument may be NULL unless
// its description says so.

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#    if defined(COREINFER_BUILD)
#        define COREINFER_API __declspec(dllexport)
#    else
#        define COREINFER_API __declspec(dllimport)
#    endif
#else
#    define COREINFER_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct llama_context;
struct ggml_backend_buffer_type;

struct coreinfer_context;

enum coreinfer_status {
    COREINFER_OK          = 0,
    COREINFER_INVALID     = 1, // an argument is not valid
    COREINFER_IO          = 2, // the model file could not be read
    COREINFER_NO_MEMORY   = 3,
    COREINFER_UNSUPPORTED = 4, // the model has no FFN that a core set can take the place of
    COREINFER_INTERNAL    = 5,
};

// One dense FFN of the model, in the order of the graph.
struct coreinfer_ffn {
    int32_t  layer;     // number of the layer (block) it belongs to
    int32_t  n_in;      // width of its input
    int32_t  n_ff;      // number of neurons
    int32_t  n_out;     // width of its output
    int32_t  up_type;   // ggml_type of up
    int32_t  down_type; // ggml_type of down
    bool     gated;     // has a gate, apart or fused with up
    uint64_t n_bytes;   // of its weights in the model
};

// The core set of one FFN.
struct coreinfer_core {
    int32_t         ffn;       // index of the FFN
    int32_t         n_neurons; // 1 .. n_ff
    const int32_t * neurons;   // strictly ascending, each in 0 .. n_ff - 1
    const float *   fill;      // [n_ff] value that stands for each neuron left out, or NULL for zero
};

// Changes whenever this header does in a way that a caller must know.
#define COREINFER_API_VERSION 6
COREINFER_API int32_t coreinfer_api_version(void);

// Why the last call of this thread failed. Valid until the thread's next failure.
COREINFER_API const char * coreinfer_last_error(void);

// Attach to a llama_context. paths are the files the model was loaded from (more than one if it is
// split). The result is the caller's, to be freed with coreinfer_free, before or after the llama_context;
// once that is freed every other call fails, and so does every call with NULL. So it does for one whose place another
// has taken: the last attached to a llama_context is the one in force.
COREINFER_API enum coreinfer_status coreinfer_new(struct llama_context * llama, const char * const * paths,
                                                  int32_t n_paths, int32_t n_threads,
                                                  struct coreinfer_context ** result);

// Detach and free, compact tensors included. NULL is allowed.
COREINFER_API void coreinfer_free(struct coreinfer_context * ctx);

COREINFER_API int32_t coreinfer_n_ffn(const struct coreinfer_context * ctx);

COREINFER_API enum coreinfer_status coreinfer_ffn_get(const struct coreinfer_context * ctx, int32_t ffn,
                                                      struct coreinfer_ffn * result);

// The ggml_type that columns of a down tensor of the given ggml_type are stored in once gathered; -1 if the
// number is no ggml_type.
COREINFER_API int32_t coreinfer_column_type(int32_t type);

//
// statistics of the activation (what down is multiplied with)
//

// What is added up besides sum and sum of squares; combine with |.
enum coreinfer_stat {
    COREINFER_STAT_NORMALIZED = 1, // squares of the token's activation scaled to norm 1 (GRIFFIN, arXiv 2404.01365)
    COREINFER_STAT_TOP        = 2, // how often a neuron is among the token's largest positive (CoreInfer, section 3)
    COREINFER_STAT_ACTIVE     = 4, // how often it is not zero: with ReLU, 1 - the activation sparsity
};

// Start or stop adding each evaluated token to the statistics. extra: more of them, of coreinfer_stat.
// top_share, in 0 .. 1: how many of a token's positive neurons COREINFER_STAT_TOP takes, rounded up.
COREINFER_API enum coreinfer_status coreinfer_stats_collect(struct coreinfer_context * ctx, bool on, uint32_t extra,
                                                            float top_share);

// Forget all tokens so far.
COREINFER_API enum coreinfer_status coreinfer_stats_clear(struct coreinfer_context * ctx);

// Sums over the tokens for one FFN. Each array [n_ff] is the caller's and may be NULL.
struct coreinfer_stats {
    float * sum;           // activation
    float * sum_sq;        // its square
    float * normalized_sq; // COREINFER_STAT_NORMALIZED; 0 for tokens evaluated without it
    float * top;           // COREINFER_STAT_TOP; likewise
    float * active;        // COREINFER_STAT_ACTIVE; likewise
    float   n_tokens;      // result; in the last layer only the tokens whose logits were asked for are evaluated
};

COREINFER_API enum coreinfer_status coreinfer_stats_get(struct coreinfer_context * ctx, int32_t ffn,
                                                        struct coreinfer_stats * result);

// norms: the squared Euclidean norm of each column of down, for all FFNs, one after the other.
COREINFER_API enum coreinfer_status coreinfer_down_norms(struct coreinfer_context * ctx, float * norms);

//
// core set
//

// Gather these core sets and drop any other. An FFN not named stays dense. Those whose neurons and
// fill are as they were are not gathered again. One of all neurons has the weights as they are, and no fill. After a
// failure no core set is left.
COREINFER_API enum coreinfer_status coreinfer_core_set(struct coreinfer_context *    ctx,
                                                       const struct coreinfer_core * cores, int32_t n_cores);

// Evaluate with the core set, or dense. With no core set gathered both are the same.
COREINFER_API enum coreinfer_status coreinfer_core_use(struct coreinfer_context * ctx, bool on);

// Copy the weights of the model (attention, output, FFNs) into the order of our own kernels, and multiply by the
// copies in evaluations of a few tokens: faster than ggml's kernels, with another rounding. Off at first. Only
// quantised weights that the CPU multiplies are copied, and those that the processor has a kernel for (see
// packed_weights.h); nothing is copied while the FFNs stream. Turning it off frees the copies. A failure does, too.
COREINFER_API enum coreinfer_status coreinfer_repack(struct coreinfer_context * ctx, bool on);

// Multiply by the copies, or leave them aside: then the model is evaluated as llama.cpp does, to the last bit.
COREINFER_API enum coreinfer_status coreinfer_repack_use(struct coreinfer_context * ctx, bool on);

// Bytes of the copies.
COREINFER_API uint64_t coreinfer_repack_bytes(const struct coreinfer_context * ctx);

// Bytes of the weights of all FFNs as evaluated with the core set (compact or, where dense, full); 0 once
// the llama_context is freed.
COREINFER_API uint64_t coreinfer_core_bytes(const struct coreinfer_context * ctx);

//
// weights that are in no memory
//

// The buffer type of weights that stay in the file, for llama_model_params::tensor_buft_overrides: loading a
// model does not read them, and does not take memory for them. Not with load modes that map the file. If the
// weights of an FFN are there (all, or none), evaluating it dense reads them from the files, ahead of their use,
// each time; a core set holds all of each such FFN that it does not name. The embedding may be there too, if the
// FFNs are: the rows of the tokens that are evaluated are read when they are looked up, and some hundreds stay;
// whoever reads others finds zeros. One llama_context of such a model at a time. NULL where the system is not Linux.
COREINFER_API struct ggml_backend_buffer_type * coreinfer_unread_buffer_type(void);

// What reading ahead takes: chunks of about this size, at least 4 of them.
#define COREINFER_STREAM_CHUNK (2u << 20)

// How many bytes to read ahead at the most. Besides those the weights of one FFN are in memory.
COREINFER_API enum coreinfer_status coreinfer_stream_ahead(struct coreinfer_context * ctx, uint64_t n_bytes);

// Begin to read for so many dense evaluations of the graph. It may be left out, but then each starts with nothing
// read ahead. If reading fails, evaluating is aborted (llama_decode returns 2) and coreinfer_stream_end says why.
COREINFER_API enum coreinfer_status coreinfer_stream_begin(struct coreinfer_context * ctx, int32_t n_passes);

// What has been read since coreinfer_stream_begin.
struct coreinfer_stream {
    uint64_t n_bytes;
    double   read_seconds;   // spent in reading
    double   waited_seconds; // that computing had to wait for it
};

// Stop reading, and give the memory back to the system. Fails if reading has, of the embedding too, which is read
// without being announced: call it as well when an evaluation with the core set fails. result may be NULL.
COREINFER_API enum coreinfer_status coreinfer_stream_end(struct coreinfer_context * ctx,
                                                         struct coreinfer_stream *  result);

// What a llama_context and its model take, or would, if the model was loaded without data
// (llama_model_params::no_alloc). In bytes.
struct coreinfer_memory {
    uint64_t weights; // those in the buffer type of coreinfer_unread_buffer_type left out
    uint64_t cache;   // keys and values
    uint64_t compute; // of the largest graph
};

COREINFER_API enum coreinfer_status coreinfer_memory_get(const struct llama_context * llama,
                                                         struct coreinfer_memory *    result);

#ifdef __cplusplus
}
#endif

#endif
