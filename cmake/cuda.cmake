# SPDX-License-Identifier: MIT
# Sets NATTEN_CUDA_ENABLED and, where it is true, enables the language CUDA and sets NATTEN_CUDART, the static runtime.
# nvcc is that of CUDACXX, of PATH, of /usr/local/cuda, or of the compiler wheels of PyPI, which `make` puts into
# .venv/nvcc. For AUTO, NATTEN_CUDA=1 or 0 in the environment decides, else whether there is a GPU.

set(NATTEN_CUDA_ENABLED OFF)
set(wanted ${NATTEN_CUDA})
if(wanted STREQUAL "AUTO")
  file(GLOB wanted /dev/nvidia[0-9]* /dev/dxg)
  list(LENGTH wanted wanted)
  if(DEFINED ENV{NATTEN_CUDA})
    set(wanted "$ENV{NATTEN_CUDA}")
  endif()
endif()
if(NOT wanted)
  return()
endif()

file(GLOB wheels ${CMAKE_SOURCE_DIR}/.venv/nvcc/nvidia/cu1[3-9]/bin)
find_program(NATTEN_NVCC nvcc HINTS $ENV{CUDACXX} $ENV{CUDA_HOME}/bin PATHS /usr/local/cuda/bin ${wheels})
if(NOT NATTEN_NVCC)
  set(remedy "there is no nvcc: `make` installs one from PyPI")
  if(NATTEN_CUDA STREQUAL "AUTO" AND NOT DEFINED ENV{NATTEN_CUDA})
    message(WARNING "There is a GPU, but the CUDA engines are left out: ${remedy}")
    return()
  endif()
  message(FATAL_ERROR "NATTEN_CUDA asks for the CUDA engines, but ${remedy}")
endif()

get_filename_component(nvcc_real ${NATTEN_NVCC} REALPATH)
get_filename_component(toolkit ${nvcc_real}/../.. ABSOLUTE)
# NOTE: the wheels have no lib64, where nvcc looks, and no libcudart.so, which find_package(CUDAToolkit) insists on.
find_library(NATTEN_CUDART cudart_static PATHS ${toolkit} PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib
  targets/sbsa-linux/lib NO_DEFAULT_PATH REQUIRED)
get_filename_component(cudart_folder ${NATTEN_CUDART} DIRECTORY)
set(CMAKE_CUDA_COMPILER ${NATTEN_NVCC})
set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
set(CMAKE_CUDA_FLAGS_INIT -L${cudart_folder})
set(CMAKE_CUDA_ARCHITECTURES 80)  # of the compiler check; each engine states its own
enable_language(CUDA)
foreach(kind STANDARD EXTENSION)  # CMake 3.25 does not know yet that nvcc has C++20
  if(NOT CMAKE_CUDA20_${kind}_COMPILE_OPTION)
    set(CMAKE_CUDA20_${kind}_COMPILE_OPTION -std=c++20)
  endif()
endforeach()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3")
set(NATTEN_CUDA_ENABLED ON)
message(STATUS "CUDA engines: on, nvcc ${CMAKE_CUDA_COMPILER_VERSION} in ${toolkit}")
