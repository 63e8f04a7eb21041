# The CUDA library: built wherever nvcc is, with or without a GPU, beside a CUDA or a CPU torch.
if(NOT CEAT_FAST_CUDA_ARCHS)
  # Device code for each family, and PTX of the newest for what comes after.
  set(CEAT_FAST_CUDA_ARCHS "80-real;90-real;100-real;120")
endif()
set(CMAKE_CUDA_ARCHITECTURES "${CEAT_FAST_CUDA_ARCHS}")
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)

file(GLOB cuda_sources CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/csrc/cuda/*.cu" "${CMAKE_SOURCE_DIR}/csrc/cuda/*.cpp")

# The current stream comes from libtorch_cuda, which a CPU torch lacks. Linking needs only its name and the one symbol.
file(WRITE "${CMAKE_BINARY_DIR}/torch_cuda_stub.cpp" "extern \"C\" int aoti_torch_get_current_cuda_stream() { return 1; }\n")
add_library(torch_cuda_stub SHARED "${CMAKE_BINARY_DIR}/torch_cuda_stub.cpp")
set_target_properties(torch_cuda_stub PROPERTIES
  OUTPUT_NAME torch_cuda CXX_VISIBILITY_PRESET default LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/stub")

add_library(ceat_fast_cuda SHARED ${cuda_sources})
target_compile_definitions(ceat_fast_cuda PRIVATE USE_CUDA)
# 20011: calling a host-only function from device code is an error, not code that computes garbage.
target_compile_options(ceat_fast_cuda PRIVATE
  "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-O3 -diag-error=20011 -Xcompiler=-Wall -Xcompiler=-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=>")
target_link_libraries(ceat_fast_cuda PRIVATE torch_headers torch_cuda_stub torch_cpu c10)
target_link_options(ceat_fast_cuda PRIVATE -Wl,--allow-shlib-undefined)
set_target_properties(ceat_fast_cuda PROPERTIES BUILD_WITH_INSTALL_RPATH ON)
set(CEAT_FAST_CUDA_STATUS "built with nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
