#pragma once

// The pages of mapped model files in the memory of this process. Weights in a layout of their own need them no more.

#include <cstddef>
#include <cstdint>
#include <vector>

namespace coreinfer {

class MappedPages {
  public:
    // Whether these bytes are in a shared mapping of a file, whose pages can be given back: they stay in the system's
    // cache, and come back when they are read. Mappings made after the first call are not known. Linux only.
    bool has(const void * bytes, size_t size);

    // Gives back the pages of such bytes. Those that have other bytes too stay, unless these are the bytes given back
    // just before: if one is read again, the system maps others around it.
    void give_back(const void * bytes, size_t size);

  private:
    struct Mapping {
        uintptr_t start;
        uintptr_t end;
        bool      is_small = false; // its pages are
    };

    static std::vector<Mapping> mappings();

    std::vector<Mapping> mappings_;
    bool                 is_read_ = false;
    uintptr_t            last_    = 0; // the end of what was given back last
};

} // namespace coreinfer
