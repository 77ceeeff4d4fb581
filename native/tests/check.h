#pragma once

// What the native tests are written with: TEST(a_sentence_of_behaviour) { CHECK(...); }

#include <stdexcept>
#include <string>

namespace test {

// What a failed CHECK throws.
class Failure : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

[[noreturn]] inline void fail(const char * file, int line, const char * condition, const std::string & detail = "") {
    throw Failure(std::string(file) + ":" + std::to_string(line) + ": not so: " + condition +
                  (detail.empty() ? "" : " (" + detail + ")"));
}

// Puts a test on the list that main() goes through.
struct Registration {
    Registration(const char * file, const char * name, void (*run)());
};

} // namespace test

// CHECK(condition) or CHECK(condition, detail), detail a std::string of what tells this case from others
#define CHECK(condition, ...)                                                     \
    do {                                                                          \
        if (!(condition)) {                                                       \
            test::fail(__FILE__, __LINE__, #condition, std::string(__VA_ARGS__)); \
        }                                                                         \
    } while (false)

#define TEST(name)                                                              \
    static void                     name();                                     \
    static const test::Registration name##_registration(__FILE__, #name, name); \
    static void                     name()
