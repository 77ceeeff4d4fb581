# ggml's code for AMX on a processor with AVX-512 VNNI and no AMX: native/tests/emulated_amx.h. For tests only.

include(CheckCXXSourceCompiles)
set(CMAKE_REQUIRED_FLAGS -march=native)
check_cxx_source_compiles("
    #ifndef __AVX512VNNI__
    #error
    #endif
    int main() {}" COREINFER_HAS_VNNI)
unset(CMAKE_REQUIRED_FLAGS)
if(NOT COREINFER_HAS_VNNI OR NOT GGML_NATIVE)
    message(FATAL_ERROR "COREINFER_EMULATE_AMX needs GGML_NATIVE and a processor with AVX-512 VNNI")
endif()

get_target_property(ggml_cpu_dir ggml-cpu SOURCE_DIR)
foreach(source amx/amx.cpp amx/mmq.cpp)
    set_property(SOURCE ${ggml_cpu_dir}/ggml-cpu/${source} TARGET_DIRECTORY ggml-cpu
        APPEND PROPERTY COMPILE_OPTIONS "-include;${CMAKE_CURRENT_SOURCE_DIR}/native/tests/emulated_amx.h")
    set_source_files_properties(${ggml_cpu_dir}/ggml-cpu/${source} TARGET_DIRECTORY ggml-cpu PROPERTIES
        OBJECT_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/native/tests/emulated_amx.h)
endforeach()
# These name the buffer type and the feature.
foreach(source ggml-cpu.cpp ggml-cpu.c)
    set_source_files_properties(${ggml_cpu_dir}/ggml-cpu/${source} TARGET_DIRECTORY ggml-cpu PROPERTIES
        COMPILE_DEFINITIONS __AMX_INT8__=1)
endforeach()
