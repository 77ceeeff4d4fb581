#pragma once

// Gathers the compact tensors of core sets from the files of the model.

#include "core_set.h"
#include "ffn.h"
#include "parallel.h"
#include "tensor_file.h"

#include <cstddef>
#include <vector>

namespace coreinfer {

// Gather the neurons and the fill of cores[i] for each i in which. Makes its tensors if it has none. Throws Error.
// cores must then not be used.
void gather_cores(const std::vector<Ffn> & ffns, std::vector<Core> & cores, const std::vector<size_t> & which,
                  bool packs, int n_threads);

// norms: the squared norms of the columns of down, [n_ff] for each FFN, one FFN after the other.
void down_norms(const std::vector<Ffn> & ffns, float * norms, int n_threads);

} // namespace coreinfer
