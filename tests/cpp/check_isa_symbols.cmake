# SPDX-License-Identifier: MIT
# Every symbol that the object files of one instruction set offer to the linker must stand in natten::cpu::<isa>, or be
# an instance for a type that does.
# NOTE: an inline function of the standard library, compiled with -mavx512f, is a weak symbol of the same name as in all
# other files. The linker keeps any one of them, so code for an old machine could call the copy that the old machine
# cannot run.
#   cmake -D NM=nm -D ISA=avx512 -D OBJECTS=a.o;b.o -P check_isa_symbols.cmake
set(foreign "")
set(own 0)
foreach(object ${OBJECTS})
  execute_process(COMMAND ${NM} --demangle --defined-only --extern-only ${object}
    OUTPUT_VARIABLE output RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${NM} failed on ${object}")
  endif()
  string(REPLACE ";" "," output "${output}")
  string(REPLACE "[" "(" output "${output}")  # brackets would keep CMake from splitting the list
  string(REPLACE "]" ")" output "${output}")
  string(REPLACE "\n" ";" lines "${output}")
  foreach(line ${lines})
    string(REGEX REPLACE "^[0-9a-f]+ [A-Za-z] " "" symbol "${line}")
    if(symbol MATCHES "^(DW\\.ref\\.|__odr_asan)")
      continue()  # pointers to data, no code
    endif()
    if(symbol MATCHES "natten::cpu::${ISA}::")
      math(EXPR own "${own} + 1")
    else()
      list(APPEND foreign "${line}")
    endif()
  endforeach()
endforeach()
if(foreign)
  list(JOIN foreign "\n  " text)
  message(FATAL_ERROR "symbols outside of natten::cpu::${ISA}:\n  ${text}")
endif()
if(own EQUAL 0)
  message(FATAL_ERROR "no symbol in natten::cpu::${ISA}: is this the right list of object files?")
endif()
message(STATUS "${own} symbols, all in natten::cpu::${ISA}")
