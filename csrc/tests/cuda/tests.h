// The tests of csrc/cuda, which main.cpp runs on a CPU. They report failures through expect() in arrays.h.
#pragma once

namespace feather {

void test_threshold();
void test_scale();
void test_select();
void test_histogram();
void test_count();

// Every kernel once or twice, for builds in which threads are slow.
void test_elementwise_once();
void test_select_once();

}  // namespace feather
