# What is installed: the library, the headers, the CMake package and the pkg-config file.
include(CMakePackageConfigHelpers)

install(TARGETS fusco_core fusco_nccl EXPORT fusco-targets)
install(TARGETS fusco_nccl_shim LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}/fusco-nccl NAMELINK_SKIP)
install(DIRECTORY include/fusco DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h" PATTERN "*.hpp")

set(FUSCO_PACKAGE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/fusco)
install(EXPORT fusco-targets NAMESPACE fusco:: DESTINATION ${FUSCO_PACKAGE_DIR})
configure_package_config_file(cmake/fusco-config.cmake.in ${PROJECT_BINARY_DIR}/fusco-config.cmake
                              INSTALL_DESTINATION ${FUSCO_PACKAGE_DIR})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/fusco-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/fusco-config.cmake ${PROJECT_BINARY_DIR}/fusco-config-version.cmake
        DESTINATION ${FUSCO_PACKAGE_DIR})

# The prefix is found from where the file lies, so that the tree can be moved.
file(RELATIVE_PATH FUSCO_PC_PREFIX /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
string(REGEX REPLACE "/$" "" FUSCO_PC_PREFIX "${FUSCO_PC_PREFIX}")
configure_file(cmake/fusco.pc.in ${PROJECT_BINARY_DIR}/fusco.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/fusco.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
