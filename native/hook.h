#pragma once

// The functions that llama.cpp calls while it builds a graph. They learn the FFNs of the model, and put other weights
// and nodes into the graph.

#include "coreinfer.h"
#include "llama-ffn.h"

namespace coreinfer {

// The hook of a context, which must live as long as the hook is set.
llama_ffn_hook hook_of(coreinfer_context & ctx);

} // namespace coreinfer
