// Rows for other programs: an array of objects, one a row (docs/benchmark.md names the keys).
#pragma once

#include <string>
#include <vector>

#include "shuffle/table.h"

namespace fusco::bench {

std::string jsonOf(const Options& options, const Header& header, const std::vector<Row>& rows);
// Throws std::runtime_error if the file cannot be written.
// Before anything is measured: what is in the file stays.
void checkWritable(const std::string& file);
void writeJson(const std::string& file, const std::string& text);

}  // namespace fusco::bench
