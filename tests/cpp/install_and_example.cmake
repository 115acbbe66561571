# SPDX-License-Identifier: MIT
# Installs the C++ package of a finished build into a scratch folder, builds examples/cpp against it and runs it:
#   cmake -D BUILD_DIR=... -D SCRATCH=... -D EXAMPLE=... -D GENERATOR=... -D COMPILER=... -P install_and_example.cmake
function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "failed (${result}): ${command}")
  endif()
endfunction()

file(REMOVE_RECURSE ${SCRATCH})
run(${CMAKE_COMMAND} --install ${BUILD_DIR} --prefix ${SCRATCH}/installed --component cpp)
# The package must be complete without the source tree and the build tree, so neither may occur in it.
file(GLOB_RECURSE files ${SCRATCH}/installed/*.cmake ${SCRATCH}/installed/*.h)
foreach(file ${files})
  file(STRINGS ${file} lines)
  string(FIND "${lines}" "${BUILD_DIR}" position)
  if(NOT position EQUAL -1)
    message(FATAL_ERROR "${file} points into the build tree")
  endif()
endforeach()
run(${CMAKE_COMMAND} -S ${EXAMPLE} -B ${SCRATCH}/build -G ${GENERATOR}
  -D CMAKE_CXX_COMPILER=${COMPILER} -D CMAKE_BUILD_TYPE=Release -D CMAKE_PREFIX_PATH=${SCRATCH}/installed)
run(${CMAKE_COMMAND} --build ${SCRATCH}/build)
run(${SCRATCH}/build/natten_example)
