// The tests of csrc/cuda on a CPU. Each records what failed with expect().
#pragma once

namespace feather {

void test_threshold();
void test_scale();
void test_select();
void test_histogram();
void test_count();

// Part of them: every kernel once or twice, for builds in which threads are costly.
void test_elementwise_once();
void test_select_once();

}  // namespace feather
