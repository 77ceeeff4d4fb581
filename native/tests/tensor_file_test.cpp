// Reading a model file: across its end, and files that are none.

#include "tensor_file.h"
#include "check.h"
#include "error.h"
#include "gguf.h"
#include "model.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>

using namespace coreinfer;
using namespace test;

// The message of the Error with this status that body throws.
static std::string error_of(coreinfer_status status, const std::function<void()> & body) {
    try {
        body();
    } catch (const Error & error) {
        CHECK(error.status == status, error.what());
        return error.what();
    }
    CHECK(!"throws");
    return "";
}

static bool contains(const std::string & text, const std::string & part) {
    return text.find(part) != std::string::npos;
}

static std::vector<uint8_t> write_bytes(const TempFile & file, int64_t n) {
    std::vector<uint8_t> bytes = Random(1).bytes(n);
    std::ofstream(file.path(), std::ios::binary).write(reinterpret_cast<const char *>(bytes.data()), n);
    return bytes;
}

TEST(a_read_gives_the_bytes_at_its_place) {
    TempFile                   temp;
    const std::vector<uint8_t> bytes = write_bytes(temp, 1000);
    const File                 file(temp.path());
    for (size_t offset : { 0, 1, 511, 999 }) {
        std::vector<uint8_t> got(1000 - offset);
        file.read(got.data(), got.size(), offset);
        CHECK(std::memcmp(got.data(), bytes.data() + offset, got.size()) == 0);
    }
    file.read(nullptr, 0, 1000);
}

TEST(a_read_across_or_beyond_the_end_is_an_error_that_names_the_file) {
    TempFile temp;
    write_bytes(temp, 1000);
    const File           file(temp.path());
    std::vector<uint8_t> got(1001);
    for (uint64_t offset : { uint64_t(0), uint64_t(999), uint64_t(1000), uint64_t(5000), uint64_t(1) << 62 }) {
        const std::string message = error_of(COREINFER_IO, [&] { file.read(got.data(), got.size(), offset); });
        CHECK(contains(message, temp.path()), message);
    }
}

TEST(a_file_that_is_missing_or_a_folder_or_no_gguf_is_an_error_that_names_it) {
    const std::string missing = (std::filesystem::temp_directory_path() / "coreinfer" / "is not here").string();
    CHECK(contains(error_of(COREINFER_IO, [&] { File file(missing); }), missing));
    CHECK(contains(error_of(COREINFER_IO, [&] { TensorFiles files({ missing }); }), missing));

    const std::string folder = std::filesystem::temp_directory_path().string();
    CHECK(contains(error_of(COREINFER_IO, [&] { TensorFiles files({ folder }); }), folder));

    TempFile noise;
    write_bytes(noise, 1000);
    CHECK(contains(error_of(COREINFER_IO, [&] { TensorFiles files({ noise.path() }); }), noise.path()));

    // a good file before a bad one is closed again
    TempFile good;
    write_model(good.path(), Shape(), 1);
    error_of(COREINFER_IO, [&] { TensorFiles files({ good.path(), noise.path() }); });
}

TEST(a_header_cut_anywhere_is_an_error) {
    TempFile whole;
    write_model(whole.path(), Shape(), 1);
    uint64_t size = 0;
    {
        gguf_context_ptr header(gguf_init_from_file(whole.path(), { /*.no_alloc =*/true, /*.ctx =*/nullptr }));
        size = gguf_get_data_offset(header.get());
    }
    for (; size > 40; size -= 37) {
        whole.cut(size - 33); // 32 is the largest padding at its end
        error_of(COREINFER_IO, [&] { TensorFiles files({ whole.path() }); });
    }
    whole.cut(0);
    error_of(COREINFER_IO, [&] { TensorFiles files({ whole.path() }); });
}

TEST(a_tensor_is_found_by_name_with_its_type_and_size_only) {
    TempFile file;
    Random   random(1);

    const std::vector<uint8_t> first  = random.weights(GGML_TYPE_Q4_0, 32 * 5);
    const std::vector<uint8_t> second = random.weights(GGML_TYPE_Q6_K, 256 * 3);
    {
        gguf_context_ptr keys(gguf_init_empty());
        write_gguf(file.path(), keys.get(),
                   { { "first", GGML_TYPE_Q4_0, { 32, 5 }, first }, { "second", GGML_TYPE_Q6_K, { 256, 3 }, second } });
    }
    const TensorFiles files({ file.path() });
    ggml_context_ptr  ctx(ggml_init({ ggml_tensor_overhead() * 8, nullptr, /*.no_alloc =*/true }));
    const auto        find = [&](const char * name, ggml_type type, int64_t n0, int64_t n1) {
        ggml_tensor * tensor = ggml_new_tensor_2d(ctx.get(), type, n0, n1);
        ggml_set_name(tensor, name);
        return files.find(tensor);
    };
    const FileTensor * found = find("second", GGML_TYPE_Q6_K, 256, 3);
    CHECK(found && found->type == GGML_TYPE_Q6_K && found->n_bytes == second.size());
    std::vector<uint8_t> got(found->n_bytes);
    found->file->read(got.data(), got.size(), found->offset);
    CHECK(got == second);

    CHECK(find("first", GGML_TYPE_Q4_0, 32, 5));
    CHECK(!find("first", GGML_TYPE_Q4_0, 32, 6));
    CHECK(!find("first", GGML_TYPE_IQ4_NL, 32, 5));
    CHECK(!find("third", GGML_TYPE_Q4_0, 32, 5));
}
