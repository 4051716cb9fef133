// The same in a build without CUDA.
#include "base/status.h"
#include "exec/cuda_nic.h"
#include "exec/cuda_peer.h"

namespace fusco::exec::cuda {

namespace {
[[noreturn]] void none() {
  fail(Code::invalidUsage, "this build of the library has no CUDA kernels: build it where nvcc is found");
}
}  // namespace

OwnStream::OwnStream() { none(); }
OwnStream::~OwnStream() = default;
bool OwnStream::drained() const { none(); }
SharedEvent::SharedEvent(bool) { none(); }
SharedEvent::SharedEvent(const Handle&) { none(); }
SharedEvent::~SharedEvent() = default;
Handle SharedEvent::handle() const { none(); }
void SharedEvent::record(Stream) { none(); }
void SharedEvent::waitOn(Stream) const { none(); }
Allocation allocationOf(const void*) { none(); }
bool tryExport(const Allocation&, Handle&) { none(); }
struct Imported::Mapping {};
Imported::Imported(const Foreign&) { none(); }
Imported::~Imported() = default;
std::byte* Imported::start() const { none(); }
bool Imported::unmapped() const { none(); }
void copyRows(const kernels::RowCopy*, std::size_t, const kernels::Budget&, Stream) { none(); }
NicWrites nicWrites() { none(); }
void flushNicWrites() { none(); }
int exportDmaBuf(const void*, std::size_t, std::string*) { none(); }

}  // namespace fusco::exec::cuda
