# libllama without our patches, on the same ggml. Tests compare with it token for token:
# LLAMA_CPP_LIB_PATH=<build>/stock makes the binding load it.

set(stock ${CMAKE_BINARY_DIR}/upstream-stock)
coreinfer_fetch_upstream(${stock})
set(stock_src ${stock}/vendor/llama.cpp/src)

# The patched target tells the sources; those that a patch adds do not exist here.
get_target_property(sources llama SOURCES)
set(stock_sources "")
foreach(source IN LISTS sources)
    string(REPLACE ${upstream}/vendor/llama.cpp/src/ "" source ${source})
    if(source MATCHES "\\.cpp$" AND EXISTS ${stock_src}/${source})
        list(APPEND stock_sources ${stock_src}/${source})
        if(NOT source MATCHES "^models/")
            set_source_files_properties(${stock_src}/${source}
                PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
        endif()
    endif()
endforeach()

add_library(stock-llama SHARED ${stock_sources})
get_target_property(llama_binary_dir llama BINARY_DIR)
target_include_directories(stock-llama PRIVATE
    ${stock_src} ${stock_src}/../include ${llama_binary_dir})
target_compile_features(stock-llama PRIVATE cxx_std_17)
target_compile_definitions(stock-llama PRIVATE LLAMA_BUILD LLAMA_SHARED)
target_link_libraries(stock-llama PRIVATE ggml)
set_target_properties(stock-llama PROPERTIES
    OUTPUT_NAME llama
    LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/stock
    RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/stock
    UNITY_BUILD ON
    UNITY_BUILD_BATCH_SIZE 16
    WINDOWS_EXPORT_ALL_SYMBOLS ON
    BUILD_WITH_INSTALL_RPATH ON
    INSTALL_RPATH ${origin}/../bin)
