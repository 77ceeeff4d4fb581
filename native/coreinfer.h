#ifndef COREINFER_H
#define COREINFER_H

// CoreInfer for llama.cpp (arXiv 2410.18311). The library collects statistics of the activations of a prompt, gathers
// the FFN neurons of a core set into compact tensors, and lets llama.cpp decode with these.
//
// A coreinfer_context belongs to one llama_context. Like a llama_context, it is used by one thread at a time.
//
// A function that can fail returns a coreinfer_status. coreinfer_last_error() then returns the reason.
//
// The caller owns every array that it passes. The library copies what it needs beyond the call. A pointer must not be
// NULL unless its description allows it. A coreinfer_context that is NULL is an error, not a crash.

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
    COREINFER_UNSUPPORTED = 4, // the model has no FFN that a core set can replace
    COREINFER_INTERNAL    = 5, // a defect of the library
};

// The version of this header. It changes with every change that a caller must know: of functions, of structures, and of
// the numbers in enumerations.
#define COREINFER_API_VERSION 15

// The version that the library was compiled with. A caller compares it with COREINFER_API_VERSION.
COREINFER_API int32_t coreinfer_api_version(void);

// Numbers of the library that a caller may plan with.
struct coreinfer_constants {
    int32_t      block;             // compact tensors are padded to a multiple of this many neurons
    int32_t      device_block;      // of a level below full on a device
    int32_t      lookup_rows;       // rows of a streamed embedding that stay in memory, unless a batch needs more
    int32_t      stream_min_chunks; // chunks that streaming reads ahead at least
    uint64_t     stream_chunk;      // bytes of a chunk, rounded up to whole groups of rows
    uint64_t     weights_ahead; // bytes that a CUDA device has for the beginning of the next weights from main memory
    const char * kernels;       // values of the environment variable COREINFER_KERNELS, separated by spaces
};

// Fills in *result. Its strings belong to the library and are never freed.
COREINFER_API void coreinfer_constants_get(struct coreinfer_constants * result);

// The reason why the last call of this thread failed. The string belongs to the library. It is valid until the next
// failure in the same thread.
COREINFER_API const char * coreinfer_last_error(void);

// Whether llama.cpp places weights in the order of the library's own kernels, in models that this thread loads from now
// on: quantised weights that the CPU multiplies, of a type that this processor has a kernel for. These kernels are
// faster than ggml's, and round differently. llama_model_params::use_extra_bufts must be true. Returns whether it is
// on: not if this processor has none of the kernels. tied: the models' embedding is the output too; it is in memory
// once then. Call it before the first model of the process is loaded. It must stay on while a context is made of a
// model without data (llama_model_params::no_alloc).
COREINFER_API bool coreinfer_load_packed(bool on, bool tied);

// The library's own kernels that this build has and this processor has the instructions for, the fastest first,
// separated by spaces. The string belongs to the library and is never freed.
COREINFER_API const char * coreinfer_kernels_here(void);

// Those in use: the first of them, or what the environment variable COREINFER_KERNELS names. "none": all is ggml's.
COREINFER_API const char * coreinfer_kernels_chosen(void);

// Attach to a llama_context. paths are the n_paths files that the model was loaded from: several if the model is split.
// n_threads is the number of threads that gather weights. packed: core sets and streamed weights are in the order of
// the library's own kernels, as the weights of a model loaded with coreinfer_load_packed(true, ...).
//
// On success *result is a new coreinfer_context. The caller owns it and frees it with coreinfer_free(), before or after
// the llama_context. Once the llama_context is freed, every other call with the coreinfer_context fails. A second
// coreinfer_context on the same llama_context takes the place of the first; calls with the first then fail.
COREINFER_API enum coreinfer_status coreinfer_new(struct llama_context * llama, const char * const * paths,
                                                  int32_t n_paths, int32_t n_threads, bool packed,
                                                  struct coreinfer_context ** result);

// Detach from the llama_context, and free the coreinfer_context with all its tensors. ctx may be NULL.
COREINFER_API void coreinfer_free(struct coreinfer_context * ctx);

//
// FFNs
//

// The precision that a neuron of a core set is kept in.
enum coreinfer_level {
    COREINFER_LEVEL_FULL   = 0, // as the model stores it; beside other levels F16 and BF16 become Q8_0
    COREINFER_LEVEL_4_BITS = 1, // in a format of the library's own, as are the next; on a device in types of ggml
    COREINFER_LEVEL_3_BITS = 2,
    COREINFER_LEVEL_2_BITS = 3,
    COREINFER_N_LEVELS     = 4,
};

// A dense FFN of the model.
struct coreinfer_ffn {
    int32_t  layer;     // number of the layer (block) that the FFN belongs to
    int32_t  n_in;      // width of its input
    int32_t  n_ff;      // number of its neurons
    int32_t  n_out;     // width of its output
    int32_t  up_type;   // ggml_type of up
    int32_t  down_type; // ggml_type of down
    bool     gated;     // it has a gate, either separate or fused with up
    uint64_t n_bytes;   // size of its weights in the model

    // Bytes that a neuron of each level takes in a core set, without biases. 0: it cannot have the level. On the CPU,
    // levels but full need the library's own kernels, for the types of all weights of the FFN; on a device, rows of a
    // multiple of 256 weights (of 64 for 2 bits, of 32 for 4).
    float neuron_bytes[COREINFER_N_LEVELS];

    // The squared error that each level makes in the output of a neuron, relative to its square.
    float neuron_errors[COREINFER_N_LEVELS];

    int32_t block; // compact tensors are padded to a multiple of this many neurons of a level below full
};

// The number of dense FFNs. FFNs are numbered from 0 in the order of the graph. 0 if ctx is NULL.
COREINFER_API int32_t coreinfer_n_ffn(const struct coreinfer_context * ctx);

// Fills in *result for one FFN.
COREINFER_API enum coreinfer_status coreinfer_ffn_get(const struct coreinfer_context * ctx, int32_t ffn,
                                                      struct coreinfer_ffn * result);

// Bytes that n weights of a row of this ggml_type take in a core set at this level, beside other levels. columns: of
// down, whose columns are gathered. 0: they cannot have the level.
COREINFER_API float coreinfer_level_bytes(enum coreinfer_level level, int32_t type, bool columns, int64_t n);

// The same on a device, where levels but full are in types of ggml.
COREINFER_API float coreinfer_device_level_bytes(enum coreinfer_level level, int32_t type, bool columns, int64_t n);

// The ggml_type that the library stores gathered columns of a down tensor in. type is the ggml_type of the tensor in
// the model. -1 if ggml has no type of this number.
COREINFER_API int32_t coreinfer_column_type(int32_t type);

// norms: the squared Euclidean norm of each column of down, [n_ff] for each FFN, one FFN after the other. The library
// reads the columns from the files.
COREINFER_API enum coreinfer_status coreinfer_down_norms(struct coreinfer_context * ctx, float * norms);

//
// statistics of the activation, which is the input of down
//

// Statistics beyond the sum and the sum of squares. Combine them with |.
enum coreinfer_stat {
    COREINFER_STAT_NORMALIZED = 1, // squares, with each token's activation scaled to norm 1 (GRIFFIN, arXiv 2404.01365)
    COREINFER_STAT_TOP        = 2, // how often a neuron is among the largest positive of a token (CoreInfer, section 3)
    COREINFER_STAT_ACTIVE     = 4, // how often a neuron is not zero; with ReLU, 1 - the activation sparsity
};

// Start (on) or stop adding evaluated tokens to the statistics. Tokens evaluated with the core set are never added.
// extra: further statistics to collect, of enum coreinfer_stat.
// top_share: the share of a token's positive neurons that COREINFER_STAT_TOP counts, from 0 to 1. The number of neurons
// is rounded up.
COREINFER_API enum coreinfer_status coreinfer_stats_collect(struct coreinfer_context * ctx, bool on, uint32_t extra,
                                                            float top_share);

// Set all statistics to zero.
COREINFER_API enum coreinfer_status coreinfer_stats_clear(struct coreinfer_context * ctx);

// Sums over the tokens, for one FFN. The caller owns the arrays, each [n_ff]. Any of them may be NULL.
struct coreinfer_stats {
    float * sum;           // sum of the activation
    float * sum_sq;        // sum of its square
    float * normalized_sq; // COREINFER_STAT_NORMALIZED; tokens evaluated without it add 0
    float * top;           // COREINFER_STAT_TOP; likewise
    float * active;        // COREINFER_STAT_ACTIVE; likewise
    float   n_tokens;      // result: number of tokens. The last layer evaluates only tokens whose logits are wanted.
};

// Copies the sums of one FFN into the arrays of *result, and sets its n_tokens.
COREINFER_API enum coreinfer_status coreinfer_stats_get(struct coreinfer_context * ctx, int32_t ffn,
                                                        struct coreinfer_stats * result);

//
// core set
//

// The core set of one FFN. The caller owns the arrays.
struct coreinfer_core {
    int32_t         ffn;       // number of the FFN
    int32_t         n_neurons; // from 1 to n_ff
    const int32_t * neurons;   // [n_neurons], strictly ascending, each from 0 to n_ff - 1
    const float *   fill;      // [n_ff]: the value that stands for a neuron that is left out. NULL: zero
    const uint8_t * levels;    // [n_neurons], of enum coreinfer_level. NULL: all full
};

// Gather these core sets, and drop all others. An FFN that is not named stays dense; if its weights are streamed, or in
// main memory while a device computes the layer, its core set is all of its neurons.
//
// An FFN whose neurons, levels and fill have not changed is not gathered again. A core set of all neurons in full has
// the weights of the model and ignores the fill. If the call fails, no FFN has a core set.
COREINFER_API enum coreinfer_status coreinfer_core_set(struct coreinfer_context *    ctx,
                                                       const struct coreinfer_core * cores, int32_t n_cores);

// What n weights become in a row of this level, which is not full. n is a multiple of 32. For tests, and to measure
// what a level costs.
COREINFER_API enum coreinfer_status coreinfer_level_round(enum coreinfer_level level, const float * weights, int64_t n,
                                                          float * result);

// The same on a device, of rows of this ggml_type, or of columns of down.
COREINFER_API enum coreinfer_status coreinfer_device_level_round(enum coreinfer_level level, int32_t type, bool columns,
                                                                 const float * weights, int64_t n, float * result);

// Evaluate with the core sets (on), or dense. FFNs without a core set are dense in both cases.
COREINFER_API enum coreinfer_status coreinfer_core_use(struct coreinfer_context * ctx, bool on);

// What the next evaluations compute.
enum coreinfer_graph {
    COREINFER_DENSE,  // the model as it is
    COREINFER_CORE,   // FFNs with a core set have that
    COREINFER_DRAFT,  // as COREINFER_CORE, but nothing is collected, and the graph is kept beside that of the others
    COREINFER_VERIFY, // as COREINFER_DENSE, and on the CPU each token gets the bits that it has as the only one

    // as COREINFER_VERIFY, and the device of a layer computes its FFN although the weights are in main memory: they are
    // sent to it
    COREINFER_VERIFY_THERE,
};

// Take another graph, of enum coreinfer_graph. coreinfer_core_use() changes between the first two.
COREINFER_API enum coreinfer_status coreinfer_graph_use(struct coreinfer_context * ctx, int32_t graph);

// Size in bytes of the weights of all FFNs as they are evaluated with the core sets: compact tensors, or the model's
// where an FFN is dense. 0 if ctx is NULL or the llama_context has been freed.
COREINFER_API uint64_t coreinfer_core_bytes(const struct coreinfer_context * ctx);

//
// streamed weights, which stay in the file
//

// A buffer type for weights that are streamed. Name it in llama_model_params::tensor_buft_overrides. It belongs to the
// library. NULL if the system is not Linux.
//
// Loading a model neither reads these weights nor takes memory for them. The model must not be loaded with mmap.
// Either all FFN weights or none must be streamed. The embedding may be streamed as well, if the FFNs are.
//
// To evaluate an FFN dense, the library reads its weights from the files, every time. It reads ahead of their use.
// To look up a token, the library reads its row of the embedding. It keeps some hundred rows. Code outside of this
// library that reads streamed weights finds zeros there.
//
// A model with streamed weights can have only one llama_context at a time.
COREINFER_API struct ggml_backend_buffer_type * coreinfer_unread_buffer_type(void);

// Set how many bytes the library reads ahead at most. The minimum is coreinfer_constants::stream_min_chunks chunks. The
// weights of one FFN are in memory besides.
COREINFER_API enum coreinfer_status coreinfer_stream_ahead(struct coreinfer_context * ctx, uint64_t n_bytes);

// Begin to read weights for the next n_passes dense evaluations of the graph. The call is optional: without it, nothing
// has been read ahead when an evaluation starts.
//
// If reading fails, llama_decode() returns 2, and coreinfer_stream_end() returns the reason.
COREINFER_API enum coreinfer_status coreinfer_stream_begin(struct coreinfer_context * ctx, int32_t n_passes);

// What the library has read since coreinfer_stream_begin().
struct coreinfer_stream {
    uint64_t n_bytes;
    double   read_seconds;   // time spent in reading
    double   waited_seconds; // time that computing waited for reading
};

// Stop reading, and return the memory to the system. Fills in *result, which may be NULL.
//
// Fails if reading weights or rows of the embedding has failed. Rows are read with the core set too: when evaluating
// with it fails, call this function to get the reason.
COREINFER_API enum coreinfer_status coreinfer_stream_end(struct coreinfer_context * ctx,
                                                         struct coreinfer_stream *  result);

//
// devices and memory
//

// A device of ggml other than the processor: a GPU, or one of an RPC server.
struct coreinfer_device {
    const char * name;        // as llama.cpp logs it, "CUDA0"
    const char * description; // "NVIDIA H100"
    uint64_t     free;        // bytes of its memory that nobody uses
    uint64_t     total;       // bytes of its memory
};

// The number of devices.
COREINFER_API int32_t coreinfer_n_devices(void);

// Fills in *result for one device. Its strings belong to ggml and are never freed.
COREINFER_API enum coreinfer_status coreinfer_device_get(int32_t device, struct coreinfer_device * result);

// Add the devices of an RPC server (rpc-server of llama.cpp, of the same protocol). endpoint is "host:port". The calls
// that follow must be made before a model is loaded that is to use them.
COREINFER_API enum coreinfer_status coreinfer_rpc_add(const char * endpoint);

// Whether an RPC server that was added does not answer any more. What was computed since is not to be used.
COREINFER_API bool coreinfer_rpc_lost(void);

// The buffer type of the processor, in memory that devices can copy from fast where there is such memory. Name it in
// llama_model_params::tensor_buft_overrides.
COREINFER_API struct ggml_backend_buffer_type * coreinfer_host_buffer_type(void);

// The bytes that a llama_context and its model take. If the model was loaded without data
// (llama_model_params::no_alloc), the bytes that they would take.
struct coreinfer_memory {
    uint64_t weights; // weights in memory: all that are not streamed
    uint64_t packed;  // of these, the weights in the order of the library's own kernels
    uint64_t cache;   // keys and values
    uint64_t compute; // buffers of the largest graph
};

// Fills in *result with what lies in the memory of one device, or, with device -1, of the host. llama needs no
// coreinfer_context.
COREINFER_API enum coreinfer_status coreinfer_memory_get(const struct llama_context * llama, int32_t device,
                                                         struct coreinfer_memory * result);

#ifdef __cplusplus
}
#endif

#endif
