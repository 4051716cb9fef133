// The compiled half of fmt 9, hidden in this library: nobody has to have libfmt.so at run time, and no other file has
// to compile it again (which would take as long as all of the rest of it). With other versions fmt is used header-only.
#include <fmt/format.h>

#if !defined(FMT_HEADER_ONLY)
static_assert(FMT_VERSION >= 90000 && FMT_VERSION < 100000);

#include <fmt/format-inl.h>

FMT_BEGIN_NAMESPACE
namespace detail {

// What format.h declares as compiled elsewhere.
template dragonbox::decimal_fp<float> dragonbox::to_decimal(float) noexcept;
template dragonbox::decimal_fp<double> dragonbox::to_decimal(double) noexcept;
template locale_ref::locale_ref(const std::locale&);
template std::locale locale_ref::get<std::locale>() const;
template thousands_sep_result<char> thousands_sep_impl(locale_ref);
template char decimal_point_impl(locale_ref);
template void buffer<char>::append(const char*, const char*);
template void vformat_to(buffer<char>&, string_view, format_args, locale_ref);

}  // namespace detail
FMT_END_NAMESPACE
#endif
