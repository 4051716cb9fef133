# Installs FUSCO into a fresh prefix, moves that, and builds and runs the consumer against it: by find_package, and by
# pkg-config where that is there. Given: BUILD (FUSCO's build folder), FOLDER (to work in), GENERATOR, CXX, CC.
function(run)
  execute_process(COMMAND ${ARGV} RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "${ARGV}\n${output}\nended with ${status}")
  endif()
endfunction()

set(source ${CMAKE_CURRENT_LIST_DIR})
file(REMOVE_RECURSE ${FOLDER})
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${FOLDER}/first)
file(RENAME ${FOLDER}/first ${FOLDER}/moved)

run(${CMAKE_COMMAND} -G ${GENERATOR} -S ${source} -B ${FOLDER}/build -DCMAKE_PREFIX_PATH=${FOLDER}/moved
    -DCMAKE_C_COMPILER=${CC} -DCMAKE_CXX_COMPILER=${CXX})
run(${CMAKE_COMMAND} --build ${FOLDER}/build)
run(${FOLDER}/build/consumer_c)
run(${FOLDER}/build/consumer_cxx)
run(${CMAKE_COMMAND} -E env FUSCO_DEVICE=host ${FOLDER}/build/consumer_nccl)
file(GLOB_RECURSE shim ${FOLDER}/moved/*/fusco-nccl/libnccl.so.2)
if(NOT shim)
  message(FATAL_ERROR "no libnccl.so.2 in a folder of its own was installed")
endif()

# Programs that were installed with it find their library there. shuffle_mpi_peer needs none, and knows no --help.
file(GLOB programs ${FOLDER}/moved/bin/*)
list(FILTER programs EXCLUDE REGEX "mpi_peer$")
foreach(program ${programs})
  run(${program} --help)
endforeach()

find_program(PKG_CONFIG pkg-config)
if(PKG_CONFIG)
  file(GLOB_RECURSE file ${FOLDER}/moved/*/fusco.pc)
  get_filename_component(folder ${file} DIRECTORY)
  set(ENV{PKG_CONFIG_PATH} ${folder})
  execute_process(COMMAND ${PKG_CONFIG} --cflags --libs fusco OUTPUT_VARIABLE flags COMMAND_ERROR_IS_FATAL ANY)
  separate_arguments(flags UNIX_COMMAND "${flags}")
  run(${CC} -std=c99 ${source}/consumer.c -o ${FOLDER}/by_pkg_config ${flags})
  execute_process(COMMAND ${PKG_CONFIG} --variable=libdir fusco OUTPUT_VARIABLE libdir OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(ENV{LD_LIBRARY_PATH} ${libdir})
  run(${FOLDER}/by_pkg_config)
endif()
