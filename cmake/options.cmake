# Compiler settings that hold for every target of the project.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

# No -march: what the CPU has is found out at run time by src/exec.
set(CMAKE_CXX_FLAGS_RELEASE "-O3 -DNDEBUG")

add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wshadow>")
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # GCC 12 sees overlaps in std::string where there are none (its bug 105651).
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict>)
endif()
if(FUSCO_WERROR)
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()

if(FUSCO_SANITIZE)
  list(JOIN FUSCO_SANITIZE "," FUSCO_SANITIZE_LIST)
  add_compile_options(-fsanitize=${FUSCO_SANITIZE_LIST} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1)
  add_link_options(-fsanitize=${FUSCO_SANITIZE_LIST})
  if("undefined" IN_LIST FUSCO_SANITIZE)
    # vptr opens a pipe for each look, and so cries wolf in tests that use up the descriptors; null is the address
    # sanitizer's work too, object-size needs more optimisation than this: both would double the time of compiling.
    add_compile_options(-fno-sanitize=vptr,null,object-size)
  endif()
  if("thread" IN_LIST FUSCO_SANITIZE AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC warns of each stand-alone fence, which the sanitizer cannot see.
    add_compile_options(-Wno-tsan)
  endif()
endif()

option(FUSCO_PRECOMPILE "Parse the headers that most files include once a target, not once a file" ON)

# fusco_precompile(TARGET [AS OTHER]): half of the time of compiling most files went into these headers. AS: takes those of
# a target that is compiled by the same rules. Files include what they use all the same: CI also builds without this.
function(fusco_precompile target)
  cmake_parse_arguments(PARSE_ARGV 1 ARG "" "AS" "")
  if(NOT FUSCO_PRECOMPILE)
    return()
  endif()
  # GCC's optimiser does not know precompiled headers as the system's: what it says wrongly of std::string comes back.
  target_compile_options(
    ${target} PRIVATE "$<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-restrict;-Wno-stringop-overflow;-Wno-stringop-overread;-Wno-array-bounds>")
  if(ARG_AS)
    target_precompile_headers(${target} REUSE_FROM ${ARG_AS})
    return()
  endif()
  set(headers <algorithm> <atomic> <cstdint> <cstring> <fmt/format.h> <functional> <map> <memory> <mutex> <span> <string>
              <thread> <vector>)
  list(TRANSFORM headers REPLACE "<(.*)>" "$<$<COMPILE_LANGUAGE:CXX>:<\\1$<ANGLE-R>>")
  target_precompile_headers(${target} PRIVATE ${headers})
endfunction()

# fusco_run_once(SOURCES...): in a release, not optimised: what reads command lines and files takes longer to optimise than
# it ever runs.
function(fusco_run_once)
  set_source_files_properties(${ARGV} PROPERTIES COMPILE_OPTIONS "$<$<CONFIG:Release>:-O0>" SKIP_PRECOMPILE_HEADERS ON)
endfunction()
