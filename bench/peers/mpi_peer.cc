// The MPI ranks beside shuffle_perf. Started by it with mpirun; does what it is told through the session's memory file.
#include <mpi.h>

#include <cstdio>
#include <stdexcept>
#include <string>

#include "peers/mpi_shuffle.h"

namespace fusco::bench {
namespace {

int peerMain(const std::string& path) {
  int rank = 0, ranks = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  Session session = Session::attach(path);
  if (static_cast<int>(session.header().ranks) != ranks)
    throw std::runtime_error("mpirun has started another number of ranks");
  ParsedOptions parsed = parseOptions(session.words());
  if (parsed.leave) throw std::runtime_error("the session's options cannot be read");
  if (rank == 0) {
    char text[MPI_MAX_LIBRARY_VERSION_STRING];
    int length = 0;
    MPI_Get_library_version(text, &length);
    std::string version(text, static_cast<std::size_t>(length));
    version = version.substr(0, version.find(','));
    std::snprintf(session.header().peerVersion, sizeof session.header().peerVersion, "%s", version.c_str());
  }
  return serveRank(session, parsed.options, kPeerGroup, rank,
                   [](const std::string& name, const CaseContext& context) { return makeMpi(name, context); });
}

}  // namespace
}  // namespace fusco::bench

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "shuffle_mpi_peer: a part of shuffle_perf, which starts it by itself\n");
    return 2;
  }
  MPI_Init(&argc, &argv);
  int code = 1;
  try {
    code = fusco::bench::peerMain(argv[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "shuffle_mpi_peer: %s\n", error.what());
  }
  if (code != 0) MPI_Abort(MPI_COMM_WORLD, code);
  MPI_Finalize();
  return code;
}
