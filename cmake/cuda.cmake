# Finds nvcc and enables CUDA: a system nvcc >= 13.0, else the one of the build requirements from PyPI.
# Sets VLMKERNELS_WITH_CUDA, VLMKERNELS_CUDA_INCLUDE, VLMKERNELS_CUTLASS_INCLUDE, VLMKERNELS_COMPILERS.
set(VLMKERNELS_COMPILERS "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
if(VLMKERNELS_CPU_ONLY)
  set(VLMKERNELS_WITH_CUDA FALSE)
  set(VLMKERNELS_CUDA_ARCHS "")
  message(STATUS "vlmkernels: CPU only, as VLMKERNELS_CPU_ONLY asks")
  return()
endif()

# The folder of an installed Python package; empty when it is not there.
function(python_package_dir package out)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u\ntry: s = u.find_spec('${package}')\nexcept ImportError: s = None\nprint(list(s.submodule_search_locations)[0] if s else '')"
    OUTPUT_VARIABLE dir OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(${out} "${dir}" PARENT_SCOPE)
endfunction()

find_program(VLMKERNELS_SYSTEM_NVCC nvcc PATHS /usr/local/cuda/bin)
option(VLMKERNELS_PIP_NVCC "take nvcc from the nvidia-cuda-nvcc wheel even when the system has one" OFF)
set(system_version 0)
if(VLMKERNELS_SYSTEM_NVCC AND NOT VLMKERNELS_PIP_NVCC)
  execute_process(COMMAND ${VLMKERNELS_SYSTEM_NVCC} --version OUTPUT_VARIABLE text ERROR_QUIET)
  if(text MATCHES "release ([0-9]+\\.[0-9]+)")
    set(system_version ${CMAKE_MATCH_1})
  endif()
endif()
if(system_version VERSION_GREATER_EQUAL 13.0)
  set(CMAKE_CUDA_COMPILER ${VLMKERNELS_SYSTEM_NVCC})
  set(nvcc_source "system")
else()
  python_package_dir(nvidia.cu13 pip_cuda)
  if(NOT EXISTS "${pip_cuda}/bin/nvcc")
    message(FATAL_ERROR
      "vlmkernels: no nvcc >= 13.0. Build with isolation (plain `pip install .`), or `pip install nvidia-cuda-nvcc`, "
      "or set VLMKERNELS_CPU_ONLY=1.")
  endif()
  set(CMAKE_CUDA_COMPILER ${pip_cuda}/bin/nvcc)
  set(CMAKE_CUDA_FLAGS_INIT "-L${pip_cuda}/lib")  # the wheel has lib/, nvcc looks in lib64/
  set(ENV{LIBRARY_PATH} "${pip_cuda}/lib:$ENV{LIBRARY_PATH}")
  set(nvcc_source "PyPI")
endif()
foreach(arch ${VLMKERNELS_CUDA_ARCHS})  # `native` on an H100 is 90, and 90 has no wgmma
  if(arch MATCHES "^90(-.*)?$|native|all")
    message(FATAL_ERROR "vlmkernels: VLMKERNELS_CUDA_ARCHS: expected architectures like 80;90a, got ${arch}: "
      "the kernels for Hopper need 90a")
  endif()
endforeach()
set(CMAKE_CUDA_ARCHITECTURES "${VLMKERNELS_CUDA_ARCHS}")  # before enable_language; embeds code and PTX
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
set(VLMKERNELS_WITH_CUDA TRUE)
set(VLMKERNELS_CUDA_INCLUDE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
string(APPEND VLMKERNELS_COMPILERS ", nvcc ${CMAKE_CUDA_COMPILER_VERSION} (${nvcc_source})")
python_package_dir(cutlass_library cutlass_library)
set(VLMKERNELS_CUTLASS_INCLUDE "")
if(cutlass_library)
  set(VLMKERNELS_CUTLASS_INCLUDE "${cutlass_library}/source/include")
endif()
message(STATUS "vlmkernels: ${VLMKERNELS_COMPILERS}, architectures ${VLMKERNELS_CUDA_ARCHS}")
