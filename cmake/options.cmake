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
