#pragma once

// Gathers the compact tensors of core sets from the files of the model.

#include "core_set.h"
#include "ffn.h"
#include "parallel.h"
#include "tensor_file.h"

#include <cstddef>
#include <vector>

namespace coreinfer {

// Gather neurons and fill into cores[i] for each listed i, making its tensors if it has none.
// Throws Error; cores is then not to be used.
void gather_cores(const std::vector<Ffn> & ffns, std::vector<Core> & cores, const std::vector<size_t> & which,
                  int n_threads);

// Copy a tensor as it is from its file.
void copy_whole(const FileTensor & file, ggml_tensor * to, Scratch & scratch);

// For each FFN in turn, the squared norms [n_ff] of the columns of its down tensor.
void down_norms(const std::vector<Ffn> & ffns, float * norms, int n_threads);

} // namespace coreinfer
