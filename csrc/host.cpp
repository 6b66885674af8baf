// tab._host: host code without torch. Build facts; batch assembly for images.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_host, m) {
    m.doc() = "Host code of TAB: no torch in it.";
    m.attr("compiler") = __VERSION__;
}
